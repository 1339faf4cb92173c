"""Options of commands about one prompt: the prompt, and an answer that follows it."""

from collections.abc import Sequence
from dataclasses import replace
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


def check_prompt(given: dict[str, Any]) -> None:
    """Before a model is loaded. Raises click.UsageError."""
    if given["prompt"] == "":
        raise click.UsageError("--prompt is empty: give a text, or leave --prompt out for the default one")
    if given["images"] and given["prompt"] is None:
        raise click.UsageError("--image goes with --prompt: which text stands behind it?")


def chosen_prompt(hm: "HookedModel", given: dict[str, Any]) -> "Prompt":
    """The prompt with its images, followed by the answer. `given` loses the options of the chat template."""
    how = templating(given, load_settings())
    prompt, answer = given["prompt"], given["answer"]
    if prompt is None:
        prompt, answer = DEFAULT_PROMPT, DEFAULT_ANSWER if answer is None else answer
        click.echo(f"prompt: {prompt} (the default; give your own with --prompt and --answer)", err=True)
        how = of_default_prompt(hm.tokenizer, how)
    return read(hm, prompt, given["images"], answer, how)


def read(hm: "HookedModel", text: str, images: Sequence[str], answer: str | None, how: dict[str, Any]) -> "Prompt":
    """A text as the model reads it, with its images before it and the answer behind it.

    The answer's tokens follow the text's. Behind images it is the assistant's message, left open; an encoder-decoder's
    decoder begins with it. `how`: the options of the chat template. Raises TokenizerError.
    """
    from hookmap.loading.encoder_decoder import is_encoder_decoder

    if images:
        goes_on = {"continue_final_message": True} if answer and how.get("chat") is not False else {}
        (encoded,) = hm.encode(with_images(text, images, how.get("chat"), answer), **{**goes_on, **how})
        return encoded
    if answer and is_encoder_decoder(hm.root):
        (encoded,) = hm.encode({"prompt": text, "decoder_text": answer}, **how)
        return encoded
    (encoded,) = hm.encode(text, **how)
    behind = hm.tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else ()
    return replace(encoded, token_ids=(*encoded.token_ids, *behind))


def check_pictures(files: tuple[str | None, ...]) -> None:
    """Before a model is loaded: that charts can be drawn, and their files written. Raises CaptureError, StoreError."""
    if wanted := [file for file in files if file]:
        from hookmap.analysis.charts import check_picture, load_altair

        load_altair()
        for file in wanted:
            check_picture(file)


def save_pictures(chart: Any, files: tuple[str | None, ...]) -> None:
    """Write the chart to each file that was named; stderr says so."""
    from hookmap.analysis.charts import save_picture

    for file in files:
        if file is not None:
            click.echo(f"wrote {save_picture(chart(), file)}", err=True)
