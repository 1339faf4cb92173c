"""Options of commands about one prompt: the prompt, and an answer that follows it."""

from typing import TYPE_CHECKING, Any

import click

from hookmap.cli.chat_options import chat_options, of_default_prompt, templating
from hookmap.cli.image_option import image_option, with_images
from hookmap.cli.model_options import loading
from hookmap.cli.options import option_group
from hookmap.cli.settings import load_settings

if TYPE_CHECKING:
    from hookmap.loading.prompts import Prompt
    from hookmap.model import HookedModel

DEFAULT_PROMPT = "Tom has 3 apples. He buys 4 more. How many apples does Tom have?"
DEFAULT_ANSWER = "Tom has 3+4=<<3+4="


options = option_group(
    click.option("--prompt", metavar="TEXT", help="What the model reads."),
    image_option,
    click.option("--answer", metavar="TEXT", help="What it is taken to have answered so far; follows the prompt."),
    loading,
    chat_options,
)
"""the prompt, and how the model is loaded; `chosen_prompt` reads them"""


def chosen_prompt(hm: "HookedModel", given: dict[str, Any]) -> "Prompt | list[int]":
    """The prompt with its images; or the token ids of the prompt, followed by those of the answer."""
    images = given.get("images")
    if not images:
        return tokens(hm, given)
    if not given["prompt"] or given["answer"]:
        raise click.UsageError("--image goes with --prompt, and without --answer")
    how = templating(given, load_settings())
    (encoded,) = hm.encode(with_images(given["prompt"], images, how.get("chat")), **how)
    return encoded


def tokens(hm: "HookedModel", given: dict[str, Any]) -> list[int]:
    """The token ids of the prompt, followed by those of the answer."""
    how = templating(given, load_settings())
    prompt, answer = given["prompt"], given["answer"]
    if not prompt:
        prompt, answer = DEFAULT_PROMPT, DEFAULT_ANSWER if answer is None else answer
        click.echo(f"prompt: {prompt} (the default; give your own with --prompt and --answer)", err=True)
        how = of_default_prompt(hm.tokenizer, how)
    (encoded,) = hm.encode(prompt, **how)
    behind = hm.tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else []
    return [*encoded.token_ids, *behind]


def check_pictures(files: tuple[str | None, ...]) -> None:
    """If a chart is asked for, check that Altair is installed, before a model is loaded. Raises CaptureError."""
    if any(files):
        from hookmap.analysis.charts import load_altair

        load_altair()


def save_pictures(chart: Any, files: tuple[str | None, ...]) -> None:
    """Write the chart to each file that was named; stderr says so."""
    from hookmap.analysis.charts import save_picture

    for file in files:
        if file is not None:
            click.echo(f"wrote {save_picture(chart(), file)}", err=True)
