"""The options that say which prompts a command runs."""

from typing import Any

import click

from hookmap.cli.image_option import image_option, of_one_text
from hookmap.cli.options import count, option_group
from hookmap.cli.settings import typed_or_set

prompt_options = option_group(
    click.option("--prompt", "texts", metavar="TEXT", multiple=True, help="A prompt; may be given several times."),
    image_option,
    click.option(
        "--prompts",
        metavar="FILE",
        help="A data set: .jsonl, .json, .csv, .tsv, .parquet, .txt (a prompt a line), a folder, hf://NAME:SPLIT.",
    ),
    click.option(
        "--prompt-column", metavar="NAME", help="Where the prompt is.  [default: prompt, messages, question…]"
    ),
    click.option("--id-column", metavar="NAME", help="The samples' own names.  [default: id, where there is one]"),
    click.option("--image-column", metavar="NAME", help="The image of each text, or a list; --chat makes messages."),
    click.option(
        "--decoder-column",
        metavar="NAME",
        help="What an encoder-decoder's decoder begins with.  [default: decoder_text, decoder_token_ids]",
    ),
    click.option("--label", "labels", metavar="NAME", multiple=True, help="A column to keep, or all; repeatable."),
    count("--skip", "Leave the first N records out.", least=0, default=0, show_default=False),
    count("--limit", "No more records than these."),
)
"""which prompts; `chosen_prompts` reads them"""


def chosen_prompts(given: dict[str, Any], settings: dict[str, Any], chat: bool | None = None) -> list[Any] | None:
    """The prompts that were typed, else those of the file that was typed or that the settings name, else None.

    `given` loses the options. `chat`: whether texts go through the chat template, where it was said.
    Raises click.UsageError, with every wrong record of a file at once.
    """
    texts, typed, images = given.pop("texts"), given.pop("prompts"), given.pop("images")
    columns = typed_or_set(given, settings, "prompt_column", "id_column", "image_column", "decoder_column")
    part = {name: given.pop(name) for name in ("labels", "skip", "limit")}
    if texts and typed:
        raise click.UsageError("--prompt or --prompts, not both: which of them is meant?")
    if images:
        return of_one_text(texts, images, chat)
    if texts:
        return list(texts)
    file = typed or settings.get("prompts")
    if not file:
        return None
    from hookmap.datasets.records import load_prompts
    from hookmap.errors import DataError

    labels: Any = "all" if part["labels"] == ("all",) else part["labels"]
    try:
        return list(
            load_prompts(
                file,
                prompt=columns.get("prompt_column"),
                id=columns.get("id_column"),
                images=columns.get("image_column"),
                decoder=columns.get("decoder_column"),
                **{**part, "labels": labels},
            )
        )
    except DataError as error:
        raise click.UsageError(str(error)) from error
