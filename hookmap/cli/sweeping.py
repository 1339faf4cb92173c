"""Options of a sweep, how it runs for a person, and the tables that show what it found."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli.options import count, option_group

if TYPE_CHECKING:
    from hookmap.analysis.sweeps import Sweep
    from hookmap.datasets.pairs import Pair
    from hookmap.model import HookedModel

_COLUMNS, _CELLS = 12, 12
"""the most columns of a table, and cells of a list"""

options = option_group(
    click.option("--target", metavar="TOKEN", help="Sweep: the next token of the clean prompt."),
    click.option(
        "--against",
        metavar="TOKEN",
        help="Sweep: the next token of the corrupted prompt; the metric is then the difference of logits.",
    ),
    click.option(
        "--metric",
        metavar="NAME",
        help="Sweep: logit_difference, probability, log_probability, kl_divergence or loss.",
    ),
    click.option(
        "--over",
        default="positions",
        show_default=True,
        metavar="AXES",
        help="Sweep: what is patched one by one: positions, heads, heads,positions, or layers alone.",
    ),
    click.option("--heads", metavar="HEADS", help="Sweep: of a point with heads, only these: 0,3 or 0-3."),
    click.option("--noising", is_flag=True, help="Sweep: put corrupted values into the clean run instead."),
    click.option(
        "--to",
        metavar="WHERE",
        help="Sweep: patch only the paths to logits, or to heads and branches, q@9.6,q@9.9 or mlp_in@4.",
    ),
    click.option("--not-through-mlps", "held", is_flag=True, help="Sweep: hold MLPs on these paths, too."),
    count("--batch-size", "Sweep: runs at a time.", default=32),
    click.option("-o", "--output", metavar="FILE", help="Sweep: write FILE.safetensors, FILE.csv and FILE.json."),
    click.option("--resume", is_flag=True, help="Sweep: go on with the one that was writing to -o FILE."),
    click.option("--png", metavar="FILE", help="Sweep: write a heat map to FILE."),
    click.option("--html", metavar="FILE", help="Sweep: write an interactive heat map to FILE, self-contained."),
)
"""what a sweep takes; `read` reads them"""
_NAMES = ("target", "against", "metric", "heads", "noising", "to", "held", "output", "resume", "png", "html")


def read(given: dict[str, Any], sweeps: bool) -> dict[str, Any]:
    """What `sweep` takes of it. `given` loses these options. Raises click.UsageError where there is no sweep."""
    from hookmap.cli.parsing import parse_heads

    found = {name: given.pop(name) for name in (*_NAMES, "over", "batch_size")}
    if not sweeps and any(found[name] for name in _NAMES):
        typed = ", ".join("--not-through-mlps" if n == "held" else f"--{n}" for n in _NAMES if found[n])
        raise click.UsageError(f"{typed.replace('--output', '-o')}: of a sweep: add --sweep, or --pairs FILE")
    if found["resume"] and not found["output"]:
        raise click.UsageError("--resume goes on with the sweep that was writing to a file: name it with -o FILE")
    found["heads"] = None if found["heads"] is None else parse_heads(found["heads"])
    return found


def read_pairs(file: str) -> "list[Pair]":
    """Raises click.UsageError with every wrong record."""
    from hookmap.datasets.pairs import load_pairs
    from hookmap.errors import DataError

    try:
        return load_pairs(file)
    except DataError as error:
        raise click.UsageError(str(error)) from error


def run(hm: "HookedModel", prompts: tuple[Any, ...], where: dict[str, Any], given: dict[str, Any]) -> "Sweep":
    """Sweep with a progress bar. With an output, values are written beside it as they come."""
    from hookmap.cli.console import progress

    chosen: dict[str, Any] = {
        name: given[name] for name in ("target", "against", "metric", "over", "heads", "noising", "to")
    }
    store = f"{given['output']}.sweep.jsonl" if given["output"] else None
    more: dict[str, Any] = {"batch_size": given["batch_size"], "store": store, "resume": given["resume"]}
    with progress() as bars:
        bar = bars.add_task("patches", total=None)

        def show(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total)

        more |= {"through_mlps": not given["held"], "progress": show}
        return hm.sweep(*prompts, **{**where, **chosen, **more})


def finish(found: "Sweep", given: dict[str, Any], save_pictures: Callable[..., None]) -> None:
    """Show what was found, and write the files that were asked for."""
    from pathlib import Path

    _show(found)

    def chart() -> Any:
        from hookmap.analysis.charts import heat_map

        return heat_map(found.effect)

    save_pictures(chart, (given["png"], given["html"]))
    if given["output"]:
        click.echo(str(found.save(given["output"])))
        Path(f"{given['output']}.sweep.jsonl").unlink()


def _show(found: "Sweep") -> None:
    from hookmap.cli.console import console
    from hookmap.wording import counted

    screen = console()
    if found.effect.column == "position":
        _show_grid(found)
    else:
        _show_list(found)
    several = len(found.values) > 1
    of = f" (means of {counted(len(found.values), 'pair')})" if several else ""
    path = f", {found.path}" if found.path else ""
    screen.print(
        f"clean {found.clean:.3f}, corrupted {found.corrupted:.3f}{of}; point {found.effect.point}{path}",
        highlight=False,
    )
    told = found.above_noise
    real = found.grid.values.isfinite()
    if within := int((~told & real).sum()):
        behind = ": in brackets" if found.effect.column == "position" else ""
        screen.print(
            f"{within} of {int(real.sum())} effects are in the metric's noise, {found.noise:.2g}{behind}",
            highlight=False,
        )
    if several and (odd := int((found.clean_of_pairs <= found.corrupted_of_pairs).sum())):
        screen.print(f"in {counted(odd, 'pair')} the clean prompt does not score above the corrupted one")


def _show_grid(found: "Sweep") -> None:
    """The positions with the largest effects, in the order of the text."""
    from hookmap.analysis.grid_table import grid_table
    from hookmap.cli.console import console

    effect, told = found.effect, found.above_noise
    largest = effect.values.abs().nan_to_num(0).amax(0)
    most = sorted(largest.argsort(descending=True)[:_COLUMNS].tolist())
    shown = replace(
        effect,
        values=effect.values[:, most],
        positions=tuple(effect.positions[n] for n in most),
        tokens=tuple(effect.tokens[n] for n in most),
    )
    screen = console()
    screen.print(grid_table(shown, told=told[:, most].tolist()))
    if others := [float(value) for n, value in enumerate(largest.tolist()) if n not in most]:
        screen.print(f"{len(others)} other positions: {max(others):.2f} at most")


def _show_list(found: "Sweep") -> None:
    """The cells with the largest effects, with their intervals."""
    from hookmap.cli.console import console, table

    several = len(found.values) > 1
    ends = found.interval() if several else None
    rows = table("cell", ">effect", *([">95 % interval"] if several else []))
    for cell in found.top(_CELLS):
        between = [] if ends is None else [" to ".join(f"{each.values[cell.row, cell.column]:+.3f}" for each in ends)]
        rows.add_row(cell.name, f"{cell.effect:+.3f}", *between)
    screen = console()
    screen.print(f"[bold]{found.effect.metric}[/]\n")
    screen.print(rows)
