"""`hookmap inspect`: what is in a capture folder."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli.options import count
from hookmap.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

FAR = 10
"""times the median norm, from which on one row rules every mean: an attention sink is 100 times it"""


@click.command()
@click.argument("folder", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout, and no tables.")
@count("--texts", "How many samples to show.", least=0, default=5)
@click.option(
    "--norms/--no-norms",
    default=None,
    help="Read every tensor for its rows' norms and what is not finite, or do not.  "
    "[default: where there are at most 10,000 samples]",
)
@click.option("--verify", is_flag=True, help="Read all of it and check it; exit code 1 if something is broken.")
def command(folder: str, as_json: bool, texts: int, norms: bool | None, verify: bool) -> None:
    """Show what a capture holds.

    Tensors, dtypes, sizes, norms by layer, and texts of the capture in DIR.

    \b
    hookmap inspect run
    hookmap inspect run --verify --texts 0

    The tables go to stderr; the JSON goes to stdout.
    """
    import hookmap
    from hookmap.cli.console import console, working

    screen = console()
    store = hookmap.open_store(folder)
    with working(f"reading {folder}", quiet=as_json):
        found = store.describe(norms=norms, texts=texts)
        problems = store.verify() if verify else []
    if verify:
        found["problems"] = problems
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _show(found, screen)
    if problems:
        raise hookmap.StoreError(f"{folder} is damaged:\n" + "\n".join(f"  - {p}" for p in problems))
    if verify and not as_json:
        screen.print("[green]sound[/]: every shard and every row is there\n")


def _show(found: dict[str, Any], screen: "Console") -> None:
    from rich.markup import escape

    from hookmap.cli.console import size

    state = "[green]finished[/]" if found["finished"] else "[yellow]not finished: go on with --resume[/]"
    screen.print(f"\n[bold]{escape(found['path'])}[/]  {state}")
    model = f"{found['model']} ({found['architecture']})" if found["model"] else found["architecture"]
    screen.print(f"model    {escape(str(model))}")
    screen.print(
        f"samples  {found['samples']}, {found['rows']} rows of each tensor (the last generated token is never fed)"
    )
    shards = counted(found["shards"], "shard")
    screen.print(f"size     {size(found['bytes'])} of tensors, {size(found['bytes_on_disk'])} on disk, {shards}\n")
    _show_tensors(found, screen)
    _show_texts(found, screen)


def _show_tensors(found: dict[str, Any], screen: "Console") -> None:
    """One row for each tensor; the bar is its median norm, against the largest of its point."""
    from hookmap.cli.console import size, table

    tensors = found["tensors"]
    bad = any(tensor.get("not_finite") for tensor in tensors)
    several = any("call" in tensor for tensor in tensors)
    rows = table(
        "point",
        ">layer",
        *([">call"] if several else []),
        "dtype",
        "shape",
        ">size",
        ">mean norm",
        ">median",
        *([">not finite"] if bad else []),
        "",
    )
    largest: dict[str, float] = {}
    for tensor in tensors:
        norm = tensor.get("median_norm") or 0.0
        largest[tensor["point"]] = max(norm, largest.get(tensor["point"], 0.0))
    for tensor in sorted(tensors, key=lambda t: list(largest).index(t["point"])):
        norm = tensor.get("median_norm")
        bar = "█" * round(20 * norm / largest[tensor["point"]]) if norm else ""
        rows.add_row(
            f"[cyan]{tensor['point']}[/]",
            "" if tensor["layer"] is None else str(tensor["layer"]),
            *([str(tensor.get("call", ""))] if several else []),
            tensor["dtype"] or "",
            " × ".join(map(str, tensor["shape"])),
            size(tensor["bytes"]),
            _norm(tensor.get("mean_norm")),
            _norm(norm),
            *([f"[red]{tensor['not_finite'] or ''}[/]"] if bad else []),
            f"[dim]{bar}[/]",
        )
    screen.print(rows)
    for note in _notes(found):
        screen.print(note)


def _norm(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.1e}"


def _notes(found: dict[str, Any]) -> Iterator[str]:
    """What the table cannot say."""
    tensors = found["tensors"]
    if any("mean_norm" not in tensor for tensor in tensors):
        yield "[dim]no norms: --norms reads every tensor for them, and for what is not finite[/]"
    if found["overflow"]:
        rows = ", ".join(f"{count} of {name}" for name, count in found["overflow"].items())
        yield f"[yellow]rows that became infinite in the dtype kept: {rows}[/]"
    if bad := [tensor for tensor in tensors if tensor.get("not_finite")]:
        first = bad[0]["first_not_finite"]
        at = "the mean" if first["position"] is None else f"position {first['position']}"
        yield (
            f"[yellow]rows with an infinity or nan: the first is {bad[0]['name']}, sample {first['sample']}, {at}; "
            "norms are of the other rows[/]"
        )
    sinks = [t for t in tensors if (t.get("median_norm") or 0) > 0 and t["largest_norm"] > FAR * t["median_norm"]]
    if sinks:
        worst = max(sinks, key=lambda t: t["largest_norm"] / t["median_norm"])
        times = f"{worst['largest_norm'] / worst['median_norm']:.0f}"
        yield (
            f"[yellow]{worst['name']} has a row {times} times as long as the median, {worst['largest_share']:.0%} of "
            "the sum of all: means over positions say little. Leave such rows out: --positions 1:[/]"
        )


def _show_texts(found: dict[str, Any], screen: "Console") -> None:
    from rich.markup import escape

    for sample in found["texts"]:
        counts = f"{sample['prompt_tokens']} prompt tokens, {sample['tokens'] - sample['prompt_tokens']} generated"
        name = f" {escape(sample['id'])}" if "id" in sample else ""
        screen.print(f"\n[bold]sample {sample['sample']}{name}[/]  [dim]{counts}{_rows_of(sample)}[/]")
        if sample.get("labels"):
            screen.print(escape("  ".join(f"{name}: {json.dumps(v)}" for name, v in sample["labels"].items())))
        if sample.get("pictures"):
            names = ", ".join(each.get("name", each["sha256"][:8]) for each in sample["pictures"])
            screen.print(escape(f"images: {names} ({counted(len(sample['image_positions']), 'token')})"))
        screen.print(f"[dim]{escape(sample['prompt'].strip())}[/]")
        screen.print(escape(sample["text"].strip()))
    if (more := found["samples"] - len(found["texts"])) > 0:
        screen.print(f"\n[dim]… and {more} more: --texts {found['samples']}[/]")
    screen.print()


def _rows_of(sample: dict[str, Any]) -> str:
    """Which tokens the rows are of, where they are not simply all."""
    positions = sample.get("positions")
    if positions is None:
        return ""
    if positions == "mean":
        return ", one row: a mean over tokens"
    shown = ", ".join(map(str, positions[:8])) + (", …" if len(positions) > 8 else "")
    return f", rows of positions {shown}" if positions else ", no rows"
