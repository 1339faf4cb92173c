"""The options that say which rows of a tensor a capture keeps, and in which dtype."""

from typing import Any

import click

from hookmap.cli.options import count, option_group
from hookmap.cli.settings import typed_or_set
from hookmap.wording import whole_number

row_options = option_group(
    click.option(
        "--positions",
        metavar="WHERE",
        help="Rows of which tokens: all, prompt, generated, last, last_prompt, a span 4:20 or -5:, positions 0,3,-1, "
        "image (tokens of an image), text (the others), or text=… for tokens that contain it.  [default: all]",
    ),
    count("--every", "Only positions that N divides."),
    click.option("--mean/--no-mean", default=None, help="One row a sample: the mean over its positions."),
    click.option(
        "--features", metavar="N|LIST", help="Draw N features of each row, or keep those listed: 3,17,99 or 3,"
    ),
    click.option("--features-seed", type=int, metavar="N", help="Draws other features.  [default: 0]"),
)
dtype_options = option_group(
    click.option(
        "--keep-dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Of the rows kept.  [default: the model's own]",
    ),
    click.option(
        "--overflow",
        type=click.Choice(["warn", "refuse"]),
        help="What is infinite in --keep-dtype only.  [default: warn]",
    ),
)


def row_selection(given: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What `row_options` or the settings say, as `HookedModel.capture` takes it. `given` loses the options.

    Raises click.BadParameter.
    """
    found = typed_or_set(given, settings, "positions", "every", "mean", "features", "features_seed")
    if "features" in found:
        found["features"] = _features(found["features"])
    return found


def kept_dtype(given: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The same of `dtype_options`."""
    return typed_or_set(given, settings, "keep_dtype", "overflow")


def _features(text: str) -> int | list[int]:
    try:
        return [whole_number(part) for part in text.removesuffix(",").split(",")] if "," in text else whole_number(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: write how many, or a list: 3,17,99", param_hint="--features") from error
