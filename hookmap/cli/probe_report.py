"""What `hookmap probe` and `hookmap train-probe` both do with a report: print it, name its places."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click


def tell(report: Any, written: Sequence[Path], output: str | None, as_json: bool, show: Callable[[Any], None]) -> None:
    """A report as JSON, or as `show` prints it, with the files that it was `written` to, in the folder `output`."""
    if as_json:
        click.echo(report.model_dump_json(indent=2))
        return
    show(report)
    for path in written:
        click.echo(f"wrote {path}", err=True)
    if output:
        click.echo(output)


def name_of(place: Any) -> str:
    """A probe's point, layer and call."""
    from hookmap.wording import in_call

    return f"{place.point}{'' if place.layer is None else f' {place.layer}'}{in_call(place.call)}"


def interval(score: Any) -> str:
    """Its 95 % interval; empty where there is none."""
    return "" if score.low is None else f"{score.low:.3f}–{score.high:.3f}"


def three(value: float | None) -> str:
    """Three decimals; empty where there is no number."""
    return "" if value is None else f"{value:.3f}"
