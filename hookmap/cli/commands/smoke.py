"""`hookmap smoke`: does a running server do what it should?"""

import click

from hookmap.cli.options import FiniteRange


@click.command()
@click.argument("url")
@click.option("--key", envvar="HOOKMAP_KEY", help="The server's key, or its admin key to load a model.")
@click.option("--model", metavar="MODEL", help="The model to load and to ask.  [default: the server's first model]")
@click.option("--timeout", type=FiniteRange(min=1), default=120.0, show_default=True, metavar="SECONDS")
@click.option("--json", "as_json", is_flag=True, help="Print the steps as JSON on stdout.")
@click.pass_context
def command(ctx: click.Context, url: str, key: str | None, model: str | None, timeout: float, as_json: bool) -> None:
    """Try a running server, step by step.

    Health, load, structure, chat, a stream, a capture with its rows counted, sessions, a download, delete. It deletes
    the session that it made. The exit code is 1 where a step fails.

    \b
    hookmap smoke http://127.0.0.1:8000
    """
    import json
    from dataclasses import asdict
    from urllib.parse import urlsplit

    from hookmap.cli.console import console, table
    from hookmap.services.server.smoke import Smoke

    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        right = False
    if not right:
        raise click.BadParameter(f"{url!r} is no address: write http://127.0.0.1:8000", param_hint="URL")
    steps = list(Smoke(url, key, model, timeout).run())
    if as_json:
        click.echo(json.dumps([asdict(step) for step in steps]))
    from rich.markup import escape

    shown = table("step", "", ">s", "")
    for step in steps:
        mark = "[green]✓[/]" if step.passed else "[red]✗[/]"
        shown.add_row(step.name, mark, f"{step.seconds:.2f}", escape(step.detail))
    console().print(shown)
    ctx.exit(0 if steps[-1].passed else 1)
