"""`hookmap discover`: where every point of a model is, by one forward pass without weights."""

import sys
from typing import TYPE_CHECKING

import click

from hookmap.cli import model_options

if TYPE_CHECKING:
    from hookmap.discovery.discover import Part
    from hookmap.maps.document import ArchitectureMap


@click.command()
@click.argument("model", required=False)
@click.option("-o", "--output", metavar="FILE", type=click.Path(dir_okay=False), help="Write the map to FILE.")
@click.option(
    "--part",
    type=click.Choice(("text", "vision")),
    default="text",
    show_default=True,
    help="The language model, or the tower that reads pictures, whose positions are patches.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the map on stdout, and no table.")
@click.option("--explain", is_flag=True, help="Show the evidence for every selector, and no table.")
@click.option("-q", "--quiet", is_flag=True, help="No table and no notes.")
@model_options.trust_remote_code
def command(
    model: str | None,
    output: str | None,
    part: "Part",
    as_json: bool,
    explain: bool,
    quiet: bool,
    trust_remote_code: bool | None,
) -> None:
    """Find where every point of MODEL is, and make its map.

    Runs one forward pass without weights: nothing is downloaded but the config. The table goes to stderr. The map goes
    to FILE; without -o it goes to stdout, if that is a pipe or a file, or if --json is given.

    \b
    hookmap discover Qwen/Qwen3-0.6B -o map.json
    hookmap discover path/to/model --explain
    hookmap discover Qwen/Qwen3-VL-4B-Instruct --part vision
    """
    import hookmap
    from hookmap.cli.settings import choose_model, load_settings

    settings = load_settings()
    model = choose_model(model, settings)
    found = _discover(model, part, model_options.trusted(trust_remote_code, settings), quiet or as_json)
    if explain:
        from hookmap.maps.describe import explain as explained

        click.echo(explained(found), err=True)
    elif not (quiet or as_json):
        from hookmap.cli.console import console
        from hookmap.cli.map_table import show_map

        show_map(found, console())
    if output:
        try:
            found.save(output)
        except OSError as error:
            raise hookmap.MapError(
                f"cannot write {output}: {error.strerror or error}. Write it elsewhere: -o FILE"
            ) from error
        click.echo(f"wrote {output}", err=True)
    if as_json or not (output or sys.stdout.isatty()):
        click.echo(found.to_json(), nl=False)


def _discover(model: str, part: "Part", trust_remote_code: bool, quiet: bool) -> "ArchitectureMap":
    """By dataflow; where the hub does not answer, the shipped map, and stderr says so."""
    import hookmap
    from hookmap.cli.console import working
    from hookmap.cli.offline import shipped_map

    try:
        with working(f"reading the dataflow of {model}", quiet):
            return hookmap.discover(model, part=part, trust_remote_code=trust_remote_code)
    except hookmap.ModelError as error:
        if part != "text":
            raise
        return shipped_map(model, error)
