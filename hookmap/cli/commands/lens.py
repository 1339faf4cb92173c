"""`hookmap lens`: what the model would say at each layer."""

import json
from typing import Any

import click

from hookmap.cli import model_options, one_prompt
from hookmap.cli.options import calls_option, count


@click.command()
@click.argument("model", required=False)
@one_prompt.options
@click.option("--point", default="resid_post", show_default=True, metavar="NAME", help="Of the stream, or a branch.")
@click.option("--layers", default="all", show_default=True, metavar="LAYERS", help="8,12,16 or 0-3 or -1 or all.")
@calls_option
@click.option(
    "--positions", default="-16:", show_default=True, metavar="WHERE", help="Of the tokens, as in hookmap capture."
)
@click.option("--target", metavar="TOKEN", help="Tell of this token.  [default: what the model itself predicts]")
@count("--top", "Likeliest tokens.", default=5)
@click.option(
    "--metric",
    type=click.Choice(["probability", "rank", "worst_rank", "top_probability", "entropy", "kl"]),
    default="probability",
    show_default=True,
    help="What the colours show.",
)
@click.option("--png", metavar="FILE", help="Draw a heat map.")
@click.option("--html", metavar="FILE", help="Draw a heat map that answers the mouse; one file, no network.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout, and no table.")
def command(
    model: str | None,
    point: str,
    layers: str,
    calls: str | None,
    positions: str,
    target: str | None,
    top: int,
    metric: Any,
    png: str | None,
    html: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Read predictions off MODEL's layers.

    The logit lens: the stream at each layer and position goes through the model's own final norm and unembedding. A
    cell shows the likeliest token there; its colour the metric.

    \b
    hookmap lens
    hookmap lens Qwen/Qwen3-0.6B --prompt "The capital of France is" --png lens.png --html lens.html

    The table goes to stderr, the JSON to stdout.
    """
    from hookmap.cli.parsing import parse_calls, parse_layers
    from hookmap.cli.settings import refuse_unknown

    chosen, of_calls = parse_layers(layers), parse_calls(calls or "all")
    refuse_unknown(point, chosen, model, of_calls, positions=positions)
    one_prompt.check_prompt(given)
    one_prompt.check_pictures((png, html))
    hm = model_options.opened(model, given, quiet=as_json)
    how: dict[str, Any] = {"calls": of_calls, "positions": positions, "target": target, "top": top}
    found = hm.lens(one_prompt.chosen_prompt(hm, given), point, chosen, **how)
    grid = found.grid(metric)

    def chart() -> Any:
        from hookmap.analysis.charts import heat_map

        return heat_map(grid, found.words, log=metric.endswith("rank"))

    one_prompt.save_pictures(chart, (png, html))
    if as_json:
        click.echo(json.dumps(found.as_json(), ensure_ascii=False))
        return
    from hookmap.analysis.grid_table import grid_table
    from hookmap.cli.console import console

    console().print(grid_table(grid, found.words))
