"""What stands in for a model whose config cannot be read: the map that ships with hookmap."""

from pathlib import Path

import click

import hookmap
from hookmap.architecture_map import ArchitectureMap
from hookmap.library import load_map, shipped_near


def shipped_map(model: str, error: hookmap.ModelError) -> ArchitectureMap:
    """The shipped map of a hub id, and a note on stderr that it is one. Raises ModelError with all that was tried."""
    if Path(model).exists():
        raise error
    try:
        found = load_map(model)
    except hookmap.MapError as second:
        raise hookmap.ModelError(
            f"{error}\nhookmap ships no map that could stand in. {shipped_near(model)}"
        ) from second
    reason = str(error).partition("\n")[0]
    click.echo(f"note: {reason}", err=True)
    click.echo(
        f"note: so this is the map that ships with hookmap (transformers {found.transformers_version})", err=True
    )
    return found
