"""`hookmap circuit`: which heads, MLPs and edges between them carry the difference between two prompts."""

import json
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli import model_options, one_prompt
from hookmap.cli.chat_options import chat_options, templating
from hookmap.cli.options import count

if TYPE_CHECKING:
    from hookmap.analysis.attribution_patching import AttributionPatch
    from hookmap.analysis.edge_attribution import EdgeScores
    from hookmap.analysis.faithfulness import CircuitCurve


@click.command()
@click.argument("model", required=False)
@click.option("--pairs", metavar="FILE", help="Pairs: clean, corrupted, answer, wrong in each line or row.")
@click.option("--clean", metavar="TEXT", help="One pair instead: the prompt that has the right answer.")
@click.option("--corrupted", metavar="TEXT", help="The other prompt of it, with as many tokens.")
@click.option("--target", metavar="TOKEN", help="What follows the clean prompt.")
@click.option("--against", metavar="TOKEN", help="What follows the corrupted one.")
@click.option("--metric", metavar="NAME", default="logit_difference", show_default=True, help="See hookmap.metrics.")
@click.option("--points", metavar="POINTS", default="z,mlp_out", show_default=True, help="What is patched in thought.")
@click.option("--layers", default="all", show_default=True, metavar="LAYERS", help="8,12,16 or 0-3 or -1 or all.")
@click.option("--edges", is_flag=True, help="Edges between embedding, heads, MLPs and logits, not nodes.")
@click.option("--faithfulness", is_flag=True, help="With --edges: run circuits of growing size; CPR and CMD.")
@click.option("--noising", is_flag=True, help="Put corrupted values into the clean run, not the other way.")
@count("--steps", "Runs along the path between both prompts; more than 1: integrated gradients.", default=1)
@count("--compare", "Effects that are patched truly, to compare.", least=4, default=16)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the draw of those.")
@count("--batch-size", "Pairs that run together.", default=8)
@count("--top", "How many nodes or edges to show.", default=12)
@click.option("-o", "--output", metavar="FILE", help="Write FILE.safetensors and FILE.json.")
@click.option("--png", metavar="FILE", help="Draw the nodes, or the edges shown, to FILE.")
@click.option("--html", metavar="FILE", help="The same, interactive and self-contained.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout, and no table.")
@model_options.loading
@chat_options
def command(
    model: str | None,
    pairs: str | None,
    clean: str | None,
    corrupted: str | None,
    target: str | None,
    against: str | None,
    metric: str,
    points: str,
    layers: str,
    edges: bool,
    faithfulness: bool,
    noising: bool,
    steps: int,
    compare: int,
    seed: int,
    batch_size: int,
    top: int,
    output: str | None,
    png: str | None,
    html: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Attribute a difference between two prompts to nodes or edges.

    Attribution patching: the effect of patching each head and MLP, or with --edges each edge between them, is
    estimated from gradients. A sample is patched truly, and the correlation is shown.

    \b
    hookmap circuit --pairs pairs.jsonl --png nodes.png
    hookmap circuit MODEL --pairs pairs.jsonl --edges --steps 5 --faithfulness

    The table goes to stderr; JSON, and the name of the file that -o wrote, to stdout.
    """
    from hookmap.cli.parsing import parse_layers
    from hookmap.cli.settings import load_settings, refuse_unknown

    one = {"clean": clean, "corrupted": corrupted, "answer": target, "wrong": against}
    if (pairs is None) == (clean is None) or (clean and not (corrupted and target)):
        raise click.UsageError("give --pairs FILE, or one pair: --clean, --corrupted, --target and --against")
    if pairs is not None and any(one.values()):
        raise click.UsageError("--corrupted, --target and --against are of one pair, and --pairs has its own")
    if faithfulness and not edges:
        raise click.UsageError("--faithfulness is of circuits of edges: add --edges")
    named, chosen = [name.strip() for name in points.split(",")], parse_layers(layers)
    if edges and (points != "z,mlp_out" or layers != "all"):
        raise click.UsageError("--points and --layers are of nodes: edges are between all of them")
    refuse_unknown(named, chosen, model)
    one_prompt.check_pictures((png, html))
    how = templating(given, load_settings())
    hm = model_options.opened(model, given, quiet=as_json)
    source: Any = pairs if pairs is not None else [{name: value for name, value in one.items() if value is not None}]
    options: dict[str, Any] = {"steps": steps, "check": compare, "seed": seed, "batch_size": batch_size, **how}
    options["noising"] = noising
    found = _found(hm, source, metric, None if edges else (named, chosen), options)
    curve = hm.circuit_curve(source, found, metric, **how) if faithfulness else None

    def chart() -> Any:
        from hookmap.analysis.effect_charts import edge_bars, node_map

        return edge_bars(found, top) if edges else node_map(found)

    one_prompt.save_pictures(chart, (png, html))
    if output:
        click.echo(str(found.save(output)))
    if as_json:
        told = found.as_json() | ({} if curve is None else {"faithfulness": curve.as_json()})
        click.echo(json.dumps(told, ensure_ascii=False))
    else:
        _show(found, top, curve)


def _found(hm: Any, source: Any, metric: str, nodes: Any, options: dict[str, Any]) -> Any:
    from hookmap.cli.console import progress

    with progress() as bars:
        bar = bars.add_task("pairs", total=None)

        def show(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total)

        if nodes is None:
            return hm.edge_attribution(source, metric, progress=show, **options)
        return hm.attribution_patch(source, metric, *nodes, progress=show, **options)


def _show(found: "AttributionPatch | EdgeScores", top: int, curve: "CircuitCurve | None") -> None:
    from rich.markup import escape

    from hookmap.analysis.edge_attribution import EdgeScores
    from hookmap.cli.console import console, table
    from hookmap.wording import counted

    screen, edges = console(), isinstance(found, EdgeScores)
    base, source = float(found.base.mean()), float(found.source.mean())
    ran, other = ("clean", "corrupted") if found.noising else ("corrupted", "clean")
    steps = f", {found.steps} steps" if found.steps > 1 else ""
    screen.print(
        f"\n[bold]{escape(found.metric)}[/]  [dim]{ran}: {base:.3f}, {other}: {source:.3f}; "
        f" {counted(len(found.base), 'pair')}{steps}[/]\n"
    )
    if isinstance(found, EdgeScores):
        own = [(f"{one} → {other}", found[one, other]) for one, other, _ in found.top(top)]
    else:
        own = found.nodes()[:top]
    rows = table("edge" if edges else "node", ">effect", ">least", ">most")
    for name, values in own:
        rows.add_row(escape(name), *(f"{float(each):+.3f}" for each in (values.mean(), values.min(), values.max())))
    screen.print(rows)
    screen.print(f"\n{found.check!r}", markup=False, highlight=False)
    if curve is not None:
        shown = table(">edges", ">signed", ">by size")
        both = zip(curve.shares, curve.signed.values.tolist(), curve.absolute.values.tolist(), strict=True)
        for share, signed, absolute in both:
            shown.add_row(f"{share:.1%}", f"{signed:.3f}", f"{absolute:.3f}")
        screen.print(shown)
        screen.print(f"CPR {curve.cpr:.3f}, CMD {curve.cmd:.3f}", highlight=False)
