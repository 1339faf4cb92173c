"""`hookmap attribute`: which branch wrote a logit."""

import json
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli import model_options, one_prompt
from hookmap.cli.options import count

if TYPE_CHECKING:
    from hookmap.analysis.attribution import Attribution


@click.command()
@click.argument("model", required=False)
@one_prompt.options
@click.option("--target", metavar="TOKEN", help="The token whose logit is split.  [default: the model's prediction]")
@click.option("--against", metavar="TOKEN", help="Subtract the logit of this token.")
@click.option("--direction", metavar="FILE", help="Split what a steering vector's file reads in the stream, no logit.")
@click.option("--layer", type=int, metavar="N", help="Of that file's layers, which one.  [default: its only one]")
@click.option(
    "--position",
    type=int,
    default=-1,
    show_default=True,
    metavar="N",
    help="The position of the token, from 0; negative from the end.",
)
@click.option("--heads", is_flag=True, help="Split attention into its heads.")
@click.option("--neurons", metavar="LAYERS", help="Split the MLPs of these layers into their neurons: 8,12 or 0-3.")
@click.option("--experts", metavar="LAYERS", help="Split the mixtures of these layers into their experts.")
@count("--top", "How many parts to show.", default=12)
@click.option("--png", metavar="FILE", help="Write a bar chart of all parts to FILE.")
@click.option("--html", metavar="FILE", help="Write an interactive bar chart to FILE, self-contained.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout, and no table.")
def command(
    model: str | None,
    target: str | None,
    against: str | None,
    direction: str | None,
    layer: int | None,
    position: int,
    heads: bool,
    neurons: str | None,
    experts: str | None,
    top: int,
    png: str | None,
    html: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Split a logit of MODEL into what each branch adds.

    Direct logit attribution: with the final norm's statistic held, the logit is a sum of what the embedding and every
    mixer and MLP wrote into the stream.

    \b
    hookmap attribute --against 8
    hookmap attribute Qwen/Qwen3-0.6B --prompt "The capital of France is" --no-chat --target " Paris" --heads

    The table goes to stderr, the JSON to stdout.
    """
    one_prompt.check_prompt(given)
    one_prompt.check_pictures((png, html))
    from hookmap.analysis.steering import load_vector
    from hookmap.cli.parsing import parse_layers

    aim: dict[str, Any] = {"direction": load_vector(direction) if direction else None, "layer": layer}
    hm = model_options.opened(model, given, quiet=as_json)
    split = {"neurons": neurons, "experts": experts}
    aim |= {"heads": heads} | {name: parse_layers(layers) if layers else () for name, layers in split.items()}
    found = hm.attribute(one_prompt.chosen_prompt(hm, given), target, against, positions=[position], **aim)

    def chart() -> Any:
        from hookmap.analysis.charts import bars

        return bars(found)

    one_prompt.save_pictures(chart, (png, html))
    if as_json:
        click.echo(json.dumps(found.as_json(), ensure_ascii=False))
    else:
        _show(found, top)


def _show(found: "Attribution", top: int) -> None:
    from rich.markup import escape

    from hookmap.analysis.charts import added_to, printable
    from hookmap.cli.console import console, table

    cap = ", before the soft-cap" if found.before_soft_cap else ""
    position, total = found.positions[0], float(found.logit[0])
    screen = console()
    screen.print(
        f"\n[bold]{escape(added_to(found, 0))} = {total:.3f}[/]  "
        f"[dim]at token {position} ({escape(printable(found.tokens[0]))}){cap}[/]\n"
    )
    order = found.values[:, 0].abs().argsort(descending=True).tolist()
    rows = table("part", ">adds", ">share")
    for number in order[:top]:
        value = float(found.values[number, 0])
        rows.add_row(escape(found.parts[number]), f"{value:+.3f}", f"{value / total:+.0%}" if total else "")
    if rest := order[top:]:
        value = float(found.values[rest, 0].sum())
        rows.add_row(f"{len(rest)} others", f"{value:+.3f}", f"{value / total:+.0%}" if total else "")
    screen.print(rows)
