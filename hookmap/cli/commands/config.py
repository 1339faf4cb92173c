"""`hookmap config`: what is set, by what, and the form of hookmap.yaml."""

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hookmap.cli.configuration import Setting


@click.group()
def command() -> None:
    """Show the settings, and the form of hookmap.yaml.

    \b
    hookmap config show
    hookmap config schema > hookmap.schema.json
    """


@command.command()
@click.option("--json", "as_json", is_flag=True, help="Print the settings as JSON on stdout, and no table.")
def show(as_json: bool) -> None:
    """Say what each setting is, and where it came from.

    From weak to strong: the default, hookmap.yaml in the working directory or the nearest folder above it, and the
    variable HOOKMAP_<KEY>. What is typed is stronger than all of them. The table goes to stderr, the JSON to stdout.
    """
    from hookmap.cli.configuration import find

    found = find()
    if as_json:
        document = {key: {"value": setting.value, "source": setting.source} for key, setting in found.items()}
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        _show(found)


@command.command()
def schema() -> None:
    """Print the JSON Schema of hookmap.yaml.

    For editors, which then complete and check it; they find it by this as the file's first line:

    \b
    # yaml-language-server: $schema=hookmap.schema.json
    """
    from hookmap.cli.configuration import schema as document

    click.echo(json.dumps(document(), indent=2, ensure_ascii=False))


def _show(found: "dict[str, Setting]") -> None:
    from rich.markup import escape

    from hookmap.cli.configuration import fields
    from hookmap.cli.console import console, table

    rows, known = table("key", "value", "from", "what"), fields()
    for key, setting in found.items():
        value = setting.value if isinstance(setting.value, str) else json.dumps(setting.value)
        value = "" if setting.value is None else escape(value)
        source = "[dim]default[/]" if setting.source == "default" else f"[cyan]{escape(setting.source)}[/]"
        rows.add_row(key, value, source, f"[dim]{escape(known[key].description or '')}[/]")
    console().print(rows)
