"""What `hookmap probe` and `hookmap train-probe` both do with a report: save it, print it, name its places."""

from collections.abc import Callable
from typing import Any

import click


def tell(found: Any, output: str | None, as_json: bool, show: Callable[[Any], None]) -> None:
    """Save `found` to the folder `output`, where there is one; then its report as JSON, or as `show` prints it."""
    written = found.save(output) if output else []
    if as_json:
        click.echo(found.report.model_dump_json(indent=2))
        return
    show(found.report)
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
