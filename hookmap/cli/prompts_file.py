"""The options that say which prompts a command runs."""

from collections.abc import Callable
from typing import Any

import click

_OPTIONS = (
    click.option("--prompt", "texts", metavar="TEXT", multiple=True, help="A prompt; may be given several times."),
    click.option(
        "--prompts",
        metavar="FILE",
        help="A data set: .jsonl, .json, .csv, .tsv, .parquet, .txt (a prompt a line), a folder, hf://NAME:SPLIT.",
    ),
    click.option(
        "--prompt-column", metavar="NAME", help="Where the prompt is.  [default: prompt, messages, question…]"
    ),
    click.option("--id-column", metavar="NAME", help="The samples' own names.  [default: id, where there is one]"),
    click.option("--label", "labels", metavar="NAME", multiple=True, help="A column to keep, or all; repeatable."),
    click.option("--skip", type=click.IntRange(min=0), default=0, metavar="N", help="Leave the first N records out."),
    click.option("--limit", type=click.IntRange(min=1), metavar="N", help="No more records than these."),
)


def prompt_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of its prompts, for `read_prompts`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_prompts(
    file: str,
    prompt_column: str | None,
    id_column: str | None,
    labels: tuple[str, ...],
    skip: int,
    limit: int | None,
) -> list[Any]:
    """The prompts of a data set. Raises click.UsageError with every wrong record at once."""
    from hookmap.datasets.records import load_prompts
    from hookmap.errors import DataError

    chosen: Any = "all" if labels == ("all",) else labels
    try:
        return list(load_prompts(file, prompt=prompt_column, id=id_column, labels=chosen, skip=skip, limit=limit))
    except DataError as error:
        raise click.UsageError(str(error)) from error
