"""`hookmap heads`: which attention heads are of a well-known kind."""

import json
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli import model_options, one_prompt
from hookmap.cli.options import count

if TYPE_CHECKING:
    from hookmap.analysis.heads import HeadScores


@click.command()
@click.argument("model", required=False)
@click.option("--layers", default="all", show_default=True, metavar="LAYERS", help="8,12,16 or 0-3 or -1 or all.")
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="Read this instead of random tokens; repeatable."
)
@count("--length", "Different random tokens in a text, which repeats them.  [default: 50, or all there are]")
@count("--samples", "Texts of random tokens.", default=4)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the random tokens.")
@count("--top", "How many heads to show of each kind.", default=5)
@click.option("--png", metavar="FILE", help="Draw the scores of all heads.")
@click.option("--svg", metavar="FILE", help="The same as a vector picture.")
@click.option("--html", metavar="FILE", help="The same as a page that answers the mouse; one file, no network.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout, and no table.")
@model_options.loading
def command(
    model: str | None,
    layers: str,
    prompts: tuple[str, ...],
    length: int | None,
    samples: int,
    seed: int,
    top: int,
    png: str | None,
    svg: str | None,
    html: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Find MODEL's induction heads and others like them.

    Heads are scored as induction, previous-token, duplicate-token and attention-sink heads. A score is the
    attention that a head pays, on average, where such a head looks: 0 none, 1 all of it. The model reads random
    tokens that are repeated, and runs with eager attention, which gives its weights.

    \b
    hookmap heads
    hookmap heads HuggingFaceTB/SmolLM2-135M --png heads.png

    The table goes to stderr, the JSON to stdout.
    """
    from hookmap.cli.parsing import parse_layers
    from hookmap.cli.settings import refuse_unknown

    chosen = parse_layers(layers)
    refuse_unknown("pattern", chosen, model)
    one_prompt.check_pictures((png, svg, html))
    hm = model_options.opened(model, given, quiet=as_json)
    found = hm.head_scores(list(prompts) or None, chosen, length=length, samples=samples, seed=seed)

    def chart() -> Any:
        from hookmap.analysis.charts import head_scores

        return head_scores(found)

    one_prompt.save_pictures(chart, (png, svg, html))
    if as_json:
        click.echo(json.dumps(found.as_json(), ensure_ascii=False))
    else:
        _show(found, top, bool(prompts))


def _show(found: "HeadScores", top: int, given: bool) -> None:
    from hookmap.cli.console import console, table
    from hookmap.wording import counted

    screen, sizes = console(), sorted({len(tokens) for tokens in found.tokens})
    read = "the prompts given" if given else f"{counted(len(found.tokens), 'text')} of repeated random tokens"
    tokens = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    screen.print(f"\n[dim]eager attention, on {read}, {tokens} tokens[/]\n")
    best = {kind: found.top(kind, top) for kind in found.scores}
    shown = table(*(kind.replace("_", " ") for kind in best))
    for place in range(max(map(len, best.values()))):
        heads = [each[place] if place < len(each) else None for each in best.values()]
        shown.add_row(*("" if head is None else f"{head.name}  {head.score:.2f}" for head in heads))
    screen.print(shown)
    for reason in dict.fromkeys(found.missing.values()):
        layers = ", ".join(str(layer) for layer, why in found.missing.items() if why == reason)
        screen.print(f"\nlayers {layers} have no attention weights: {reason}", markup=False)
