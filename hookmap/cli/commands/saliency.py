"""`hookmap saliency`: which tokens of a prompt an answer depends on."""

import json
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli import model_options, one_prompt
from hookmap.cli.options import count

if TYPE_CHECKING:
    from hookmap.analysis.saliency import Saliency

METHODS = ("integrated_gradients", "gradient_x_activation", "gradient_norm")


@click.command()
@click.argument("model", required=False)
@one_prompt.options
@click.option("--target", required=True, metavar="TOKEN", help="The next token that is explained.")
@click.option("--against", metavar="TOKEN", help="Another one, whose logit is subtracted; else the log-probability.")
@click.option("--method", type=click.Choice(METHODS), default=METHODS[0], show_default=True)
@click.option("--point", default="embed", show_default=True, metavar="NAME", help="Which tensor's tokens.")
@click.option("--layer", type=int, metavar="N", help="Of a point of layers, which one.")
@count("--steps", "Of integrated gradients.", default=64)
@click.option("--png", metavar="FILE", help="Draw the tokens to FILE.")
@click.option("--html", metavar="FILE", help="The same, interactive and self-contained.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout, and no table.")
def command(
    model: str | None,
    target: str,
    against: str | None,
    method: str,
    point: str,
    layer: int | None,
    steps: int,
    png: str | None,
    html: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Score each token of a prompt by what an answer owes to it.

    Integrated gradients sum to the difference from a prompt of averaged embeddings; how nearly is shown.

    \b
    hookmap saliency --target 7 --against 8
    hookmap saliency Qwen/Qwen3-0.6B --prompt "The capital of France is" --no-chat --target " Paris"

    The table goes to stderr, the JSON to stdout.
    """
    from hookmap import metrics

    one_prompt.check_prompt(given)
    one_prompt.check_pictures((png, html))
    hm = model_options.opened(model, given, quiet=as_json)
    metric = metrics.log_probability(target) if against is None else metrics.logit_difference(target, against)
    prompt = one_prompt.chosen_prompt(hm, given)
    found = hm.saliency([prompt], metric, method, point=point, layer=layer, steps=steps)  # type: ignore[arg-type]

    def chart() -> Any:
        from hookmap.analysis.charts import heat_map

        return heat_map(found.grid())

    one_prompt.save_pictures(chart, (png, html))
    if as_json:
        click.echo(json.dumps(found.as_json(), ensure_ascii=False))
    else:
        _show(found)


def _show(found: "Saliency") -> None:
    from rich.markup import escape

    from hookmap.analysis.charts import printable
    from hookmap.cli.console import console, table

    screen, scores = console(), found.scores[0]
    screen.print(f"\n[bold]{escape(found.name)} = {float(found.metric[0]):.3f}[/]\n")
    rows = table(">position", "token", ">score")
    for position, (token, score) in enumerate(zip(found.tokens[0], scores.tolist(), strict=True)):
        rows.add_row(str(position), escape(printable(token)), f"{score:+.3f}")
    screen.print(rows)
    if found.baseline is not None and found.gap is not None:
        screen.print(
            f"\nsum {float(scores.sum()):.3f}; from the baseline's {float(found.baseline[0]):.3f} the metric rises by "
            f"{float(found.metric[0] - found.baseline[0]):.3f}: {float(found.gap[0]):.2g} of it is missed",
            highlight=False,
        )
