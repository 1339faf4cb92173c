"""If a model's config cannot be read, the shipped map of its architecture stands in."""

from pathlib import Path

import click

import hookmap
from hookmap.discovery.library import load_map
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.shipped import shipped_architectures, shipped_near


def shipped_map(model: str, error: hookmap.ModelError) -> ArchitectureMap:
    """The shipped map of the architecture `model`, with a note on stderr. Raises ModelError if none ships."""
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
