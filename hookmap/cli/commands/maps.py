"""`hookmap maps`: the maps that ship with hookmap; made, checked, compared and listed."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookmap.sweep.build import Entry

_JOBS = click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Processes at a time.")
_MULTIMODAL = click.option(
    "--multimodal", is_flag=True, help="TYPES are of models that read images or sounds too, as a whole."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, and no table.")


@click.group(context_settings={"max_content_width": 110})
def command() -> None:
    """Make, check and compare the maps that ship with hookmap.

    TYPES are transformers' model types, such as `qwen3` or `gpt2`; without any, all of its causal language models, or
    with --multimodal all that read images or sounds too.

    \b
    hookmap maps list
    hookmap maps check qwen3 gpt2
    """


@command.command()
@click.argument("types", nargs=-1)
@click.option("-o", "--output", metavar="DIR", help="Where to; without it, mappings/.")
@click.option("--table", metavar="FILE", type=click.Path(dir_okay=False), help="Write the table of all that is done.")
@click.option("--models", is_flag=True, help="Instead, the maps of well-known models, into DIR/models.")
@click.option("--resume", is_flag=True, help="Leave out what an earlier, killed run into DIR has done.")
@_MULTIMODAL
@_JOBS
@_JSON
def build(
    types: tuple[str, ...],
    output: str | None,
    table: str | None,
    models: bool,
    resume: bool,
    multimodal: bool,
    jobs: int,
    as_json: bool,
) -> None:
    """Discover each of TYPES at its default full size without weights, verify it on a narrow copy, write its map.

    What verification refutes is not written. Exit code 1 where any is SILENTLY WRONG.
    """
    from hookmap.maps.shipped import mappings_folder
    from hookmap.sweep.build import build_models, done, ledger_of

    folder = Path(output) if output else mappings_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if models:
        build_models(folder / "models", lambda name: click.echo(f"wrote the map of {name}", err=True))
        return
    wanted = _wanted(types, multimodal)
    finished = done(folder, multimodal) if resume else {}
    if not resume and not types:
        ledger_of(folder, multimodal).unlink(missing_ok=True)
    _run([name for name in wanted if name not in finished], jobs, folder=folder, multimodal=multimodal)
    entries = [entry for name, entry in sorted(done(folder, multimodal).items()) if name in wanted or not types]
    if table:
        from hookmap.sweep.table import markdown

        Path(table).write_text(markdown(entries, multimodal), encoding="utf-8")
        click.echo(f"wrote {table}", err=True)
    _show(entries, as_json)
    sys.exit(any(entry.status == "SILENTLY WRONG" for entry in entries))


@command.command()
@click.argument("types", nargs=-1)
@click.option("--tenth", type=click.IntRange(0, 9), help="TYPES, and every tenth model type from this one on.")
@click.option("--allow-drift", is_flag=True, help="A map that is right and differs from its file is no failure.")
@click.option("--record", is_flag=True, help="Write this version of transformers into each map that passes.")
@_MULTIMODAL
@_JOBS
@_JSON
def check(
    types: tuple[str, ...],
    tenth: int | None,
    allow_drift: bool,
    record: bool,
    multimodal: bool,
    jobs: int,
    as_json: bool,
) -> None:
    """Discover and verify each of TYPES anew, and compare with its shipped map.

    Exit code 1 where a map is refuted, is no longer found, or differs from the shipped one. Another version of
    transformers may lay out a model otherwise: its maps then differ and are right (--allow-drift).
    """
    from hookmap.maps.shipped import mappings_folder, shipped_architectures
    from hookmap.sweep.build import classes
    from hookmap.sweep.build import tenth as every_tenth

    wanted = _wanted(types, multimodal)
    if tenth is not None:
        drawn = every_tenth(tenth, classes(multimodal))
        wanted = tuple(dict.fromkeys((*(wanted if types else ()), *drawn)))
        click.echo(f"tenth {tenth}: {', '.join(drawn)}", err=True)
    entries = _run(wanted, jobs, shipped=mappings_folder(), record=record, multimodal=multimodal)
    _show(entries, as_json)
    shipped = shipped_architectures()
    wrong = [each.model_type for each in entries if each.status == "SILENTLY WRONG"]
    lost = [e.model_type for e in entries if e.status in ("UNAVAILABLE", "ERROR") and e.architecture in shipped]
    if lost:
        click.echo(f"no map is found any more of: {', '.join(lost)}", err=True)
    drifted = [entry for entry in entries if entry.changes]
    if allow_drift and drifted:
        click.echo(f"{len(drifted)} of {len(entries)} maps differ from the shipped ones and are right", err=True)
    sys.exit(bool(wrong or lost) or (bool(drifted) and not allow_drift))


@command.command()
@click.argument("before", type=click.Path(exists=True, path_type=Path))
@click.argument("after", type=click.Path(exists=True, path_type=Path))
@_JSON
def diff(before: Path, after: Path, as_json: bool) -> None:
    """What changed between two map files, or between two folders of them. Exit code 1 where anything did."""
    from hookmap.maps.diff import differences
    from hookmap.maps.parsing import load

    pairs = _pairs(before, after)
    found: dict[str, list[str]] = {}
    for name, (old, new) in pairs.items():
        if old is None or new is None:
            found[name] = ["gone" if new is None else "new"]
        elif lines := list(differences(load(old), load(new))):
            found[name] = lines
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        for name, lines in found.items():
            click.echo("\n".join(f"{name}: {line}" for line in lines))
        click.echo(f"{len(found)} of {len(pairs)} maps differ", err=True)
    sys.exit(bool(found))


@command.command(name="list")
@_JSON
def list_maps(as_json: bool) -> None:
    """The maps that ship with hookmap: of architectures, and of single models."""
    from hookmap.maps.shipped import shipped_architectures, shipped_models

    if as_json:
        click.echo(json.dumps({"architectures": shipped_architectures(), "models": shipped_models()}, indent=1))
        return
    click.echo("\n".join((*shipped_architectures(), *shipped_models())))
    click.echo(f"{len(shipped_architectures())} architectures, {len(shipped_models())} models", err=True)


def _wanted(types: "Sequence[str]", multimodal: bool) -> tuple[str, ...]:
    import difflib

    from hookmap.sweep.build import classes

    known = classes(multimodal)
    for name in types:
        if name not in known:
            kind = "model of images or sounds and text" if multimodal else "causal language model"
            near = difflib.get_close_matches(name, known, n=3) or sorted(known)[:8]
            raise click.UsageError(f"no {kind} of transformers is of the type {name!r}: {', '.join(near)}, …")
    return tuple(dict.fromkeys(types)) if types else tuple(known)


def _run(
    types: "Sequence[str]",
    jobs: int,
    folder: Path | None = None,
    shipped: Path | None = None,
    record: bool = False,
    multimodal: bool = False,
) -> "list[Entry]":
    from hookmap.cli.console import progress
    from hookmap.sweep.build import sweep

    with progress() as bar:
        task = bar.add_task("maps", total=len(types))

        def report(entry: "Entry") -> None:
            bar.update(task, advance=1, description=entry.model_type)
            if bar.disable or entry.status != "SUPPORTED":
                click.echo(f"{entry.model_type}: {entry.status} in {entry.seconds:.1f} s. {entry.detail}", err=True)

        return sweep(types, folder, shipped, jobs, report, record, multimodal)


def _show(entries: "Sequence[Entry]", as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in entries], indent=1))
        return
    from hookmap.cli.console import console, table

    rows = table("model type", "architecture", "status", "kinds of block", ">seconds", "what changed, or why not")
    for entry in entries:
        kinds = ", ".join(dict.fromkeys(kind.name for kind in entry.kinds))
        said = "; ".join(entry.changes) or entry.detail.replace("\n", " ")
        rows.add_row(entry.model_type, entry.architecture, entry.status, kinds, f"{entry.seconds:.1f}", said[:300])
    console(stderr=False).print(rows)
    from hookmap.sweep.table import counts

    click.echo(counts(entries), err=True)


def _pairs(before: Path, after: Path) -> "dict[str, tuple[Path | None, Path | None]]":
    if before.is_file() and after.is_file():
        return {before.stem: (before, after)}
    if before.is_file() or after.is_file():
        raise click.UsageError("expected two map files or two folders, got one of each.")
    old, new = ({p.stem: p for p in each.glob("*.json") if ".schema" not in p.name} for each in (before, after))
    return {name: (old.get(name), new.get(name)) for name in sorted({*old, *new})}
