"""`hookmap doctor`: what is installed here, what works, and what to do about what does not."""

import json
from dataclasses import asdict

import click

_MARKS = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "broken": "[red]✗[/]"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON on stdout, and no table.")
def command(as_json: bool) -> None:
    """Examine this installation.

    Versions, devices, free memory and disk, the hub, extras, settings, and a capture with the bundled model. ✓ works,
    ! something that not everybody needs does not, ✗ hookmap does not work here: then the exit code is 1.

    The table goes to stderr, the JSON to stdout.
    """
    from hookmap.cli.console import console, table, working
    from hookmap.cli.doctor import examine

    with working("examining", quiet=as_json):
        found = list(examine())
    broken = [finding for finding in found if finding.state == "broken"]
    if as_json:
        document = {"works": not broken, "findings": [asdict(finding) for finding in found]}
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        from rich.markup import escape

        rows = table("", "", "found", "what to do")
        for finding in found:
            rows.add_row(_MARKS[finding.state], escape(finding.name), escape(finding.found), escape(finding.remedy))
        console().print(rows)
    if broken:
        click.get_current_context().exit(1)
