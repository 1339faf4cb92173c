"""`hookmap inspect`: what is in a capture folder."""

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@click.argument("folder", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout, and no tables.")
@click.option(
    "--texts", type=click.IntRange(min=0), default=5, show_default=True, metavar="N", help="How many samples to show."
)
@click.option(
    "--norms/--no-norms",
    default=None,
    help="Read every tensor for its mean norm, or do not.  [default: where there are at most 10,000 samples]",
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
    shards = "1 shard" if found["shards"] == 1 else f"{found['shards']} shards"
    screen.print(f"size     {size(found['bytes'])} of tensors, {size(found['bytes_on_disk'])} on disk, {shards}\n")
    _show_tensors(found["tensors"], screen)
    _show_texts(found, screen)


def _show_tensors(tensors: list[dict[str, Any]], screen: "Console") -> None:
    """One row for each tensor; the bar is its mean norm, against the largest of its point."""
    from hookmap.cli.console import size, table

    rows = table("point", ">layer", "dtype", "shape", ">size", ">mean norm", "")
    largest: dict[str, float] = {}
    for tensor in tensors:
        norm = tensor.get("mean_norm") or 0.0
        largest[tensor["point"]] = max(norm, largest.get(tensor["point"], 0.0))
    for tensor in sorted(tensors, key=lambda t: list(largest).index(t["point"])):
        norm = tensor.get("mean_norm")
        bar = "█" * round(20 * norm / largest[tensor["point"]]) if norm else ""
        rows.add_row(
            f"[cyan]{tensor['point']}[/]",
            "" if tensor["layer"] is None else str(tensor["layer"]),
            tensor["dtype"] or "",
            " × ".join(map(str, tensor["shape"])),
            size(tensor["bytes"]),
            "" if norm is None else f"{norm:.2f}" if norm >= 0.1 or norm == 0 else f"{norm:.1e}",
            f"[dim]{bar}[/]",
        )
    screen.print(rows)
    if any("mean_norm" not in tensor for tensor in tensors):
        screen.print("[dim]no norms: --norms reads every tensor for them[/]")


def _show_texts(found: dict[str, Any], screen: "Console") -> None:
    from rich.markup import escape

    for sample in found["texts"]:
        counts = f"{sample['prompt_tokens']} prompt tokens, {sample['tokens'] - sample['prompt_tokens']} generated"
        name = f" {escape(sample['id'])}" if "id" in sample else ""
        screen.print(f"\n[bold]sample {sample['sample']}{name}[/]  [dim]{counts}{_rows_of(sample)}[/]")
        if sample.get("labels"):
            screen.print(escape("  ".join(f"{name}: {json.dumps(v)}" for name, v in sample["labels"].items())))
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
