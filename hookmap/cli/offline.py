"""What stands in for a model whose config cannot be read: the map that ships with hookmap."""

from pathlib import Path

import click

import hookmap
from hookmap.discovery.library import load_map
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.shipped import shipped_architectures, shipped_near


def shipped_map(model: str, error: hookmap.ModelError) -> ArchitectureMap:
    """The shipped map of an architecture's name, and a note on stderr that it is one. Else raises ModelError."""
    if Path(model).exists():
        raise error
    if model not in shipped_architectures():
        raise hookmap.ModelError(f"{error}\nhookmap ships no map that could stand in. {shipped_near(model)}") from error
    found = load_map(model)
    click.echo(f"note: {str(error).partition(chr(10))[0]}", err=True)
    click.echo(
        f"note: so this is the map that ships with hookmap (transformers {found.transformers_version})", err=True
    )
    return found
