"""`hookmap store`: captures checked, repaired, put together, and taken to and from other programs."""

import json
from typing import Any

import click

from hookmap.cli.options import count
from hookmap.wording import counted

_OUT = click.option(
    "-o", "--output", required=True, metavar="DIR", help="A new folder; the capture itself is not changed."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
_LAYOUTS = ("pt", "numpy", "datasets", "saelens", "probelab")


@click.group(context_settings={"max_content_width": 110})
def command() -> None:
    """Check, repair, merge, export and import captures.

    \b
    hookmap store verify run
    hookmap store repair run -o repaired
    hookmap store merge worker-0 worker-1 -o run
    hookmap store export run --to numpy -o arrays
    """


@command.command()
@click.argument("folder", metavar="DIR")
@_JSON
def verify(folder: str, as_json: bool) -> None:
    """Read all of DIR and tell every problem; exit code 1 where there is one."""
    import hookmap
    from hookmap.cli.console import working

    store = hookmap.open_store(folder)
    with working(f"reading {folder}", quiet=as_json):
        problems = store.verify()
    if as_json:
        click.echo(json.dumps({"path": folder, "sound": not problems, "problems": problems}, indent=2))
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise hookmap.StoreError(
            f"{folder} is damaged:\n{lines}\nKeep what is sound: hookmap store repair {folder} -o NEW"
        )
    click.echo(f"{folder} is sound: {counted(len(store), 'sample')}", err=True)


@command.command()
@click.argument("folder", metavar="DIR")
@_OUT
@_JSON
def repair(folder: str, output: str, as_json: bool) -> None:
    """Copy every sample of DIR that is whole and right into a new folder, and tell which are not.

    DIR, a folder or a URL, stays as it is. What is lost is made again by the capture's own command with
    -o NEW --resume; where something is lost, or a table of DIR was changed, NEW is not finished.
    """
    from hookmap.stores.copying import repair

    found = repair(folder, output)
    if as_json:
        lost = {"lost": found.lost, "missing": found.missing, "changed": found.changed}
        click.echo(json.dumps({"path": output, "kept": found.kept, **lost}, indent=2))
    for name, reason in found.lost.items():
        click.echo(f"lost: {name}: {reason}", err=True)
    for line in found.changed:
        click.echo(f"changed: {line}", err=True)
    if found.missing:
        click.echo(f"lost: {found.missing} more that the manifest counts are in no line of the table", err=True)
    lost_in_all = len(found.lost) + found.missing
    click.echo(f"kept {counted(found.kept, 'sample')} in {output}, lost {lost_in_all}", err=True)
    if lost_in_all or found.changed:
        click.echo(f"To make them again: the same hookmap capture command with -o {output} --resume", err=True)


@command.command()
@click.argument("folders", nargs=-1, required=True, metavar="DIR...")
@click.option(
    "--same-ids",
    type=click.Choice(["rename", "refuse"]),
    default="rename",
    show_default=True,
    help="If different samples have one id: rename the later ones (q7.2 for q7), or write nothing.",
)
@_OUT
@_JSON
def merge(folders: tuple[str, ...], same_ids: Any, output: str, as_json: bool) -> None:
    """Put captures of one model and of the same tensors (those of several workers, say) into one.

    A sample that another DIR has too, with the same id, prompt, tokens and labels, is left out the second time, and
    told.
    """
    from hookmap.stores.copying import merge

    found = merge(folders, output, same_ids)
    if as_json:
        result: dict[str, Any] = {"path": output, "samples": found.samples}
        result |= {"duplicates": found.duplicates, "renumbered": found.renumbered, "renamed": found.renamed}
        click.echo(json.dumps(result, indent=2))
    for line in found.duplicates:
        click.echo(f"left out: {line}", err=True)
    for line in found.renamed:
        click.echo(f"renamed: {line}", err=True)
    numbers = ", numbered anew in the order of the folders" if found.renumbered else ""
    click.echo(f"{counted(found.samples, 'sample')} in {output}{numbers}", err=True)


@command.command()
@click.argument("folder", metavar="DIR")
@click.option("--to", "layout", required=True, type=click.Choice(_LAYOUTS), help="The layout.")
@click.option("--point", metavar="POINT", help="Only this point.")
@click.option("--layer", type=int, metavar="N", help="Only this layer.")
@count("--call", "Only this run of layers that run several times.", least=0)
@count("--context", "For saelens: rows of each sequence.", unit="ROWS")
@_OUT
def export(folder: str, layout: str, output: str, **chosen: Any) -> None:
    """Write a capture in the layout of another program into a new folder.

    \b
    pt        activations.pt: a dict of plain tensors, for torch.load(weights_only=True); held in memory whole
    numpy     one .npy for each tensor
    datasets  for datasets.load_from_disk; a row for each sample
    saelens   SAELens's cached activations: one --point and --layer, sequences of --context rows
    probelab  probelab's memmap: the layers of one --point, in bfloat16
    """
    import hookmap
    from hookmap.cli.console import working
    from hookmap.stores.export import export

    store = hookmap.open_store(folder)
    with working(f"writing {output}"):
        notes = export(store, layout, output, **chosen)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    click.echo(output)


@command.command(name="import")
@click.argument("file", metavar="FILE.pt")
@click.option("--model", metavar="MODEL", help="The model's name for the manifest.")
@_OUT
def import_(file: str, model: str | None, output: str) -> None:
    """Make a capture folder of a .pt file that torch.save wrote.

    Dicts with keys such as "resid_mid.8", "layer_8.resid_mid" or ("resid_mid", 8), or nested by layer or point. A file
    that holds more than plain tensors is refused, and nothing of it is run.
    """
    from hookmap.stores.importing import import_pt

    samples, left_out = import_pt(file, output, model=model)
    if left_out:
        click.echo(f"left out: {', '.join(left_out)}", err=True)
    click.echo(f"{counted(samples, 'sample')} in {output}", err=True)
    click.echo(output)
