"""`hookmap outliers`: outlier features and massive activations."""

import json
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli import one_prompt
from hookmap.cli.chat_options import chat_options, templating
from hookmap.cli.model_options import loading, opened
from hookmap.cli.options import count
from hookmap.cli.prompts_file import chosen_prompts, prompt_options

if TYPE_CHECKING:
    from hookmap.analysis.expert_outliers import LayerExperts
    from hookmap.analysis.outliers import OutlierFeatures


@click.command()
@click.argument("model", required=False)
@click.option("--points", default="resid_post", show_default=True, metavar="NAMES", help="Features of which tensors.")
@click.option("--layers", default="all", show_default=True, metavar="LAYERS", help="8,12,16 or 0-3 or -1 or all.")
@prompt_options
@count("--batch-size", "How many texts run together.")
@count("--batch-tokens", "How many tokens are read at once.  [default: 4096]")
@count("--top", "How many features to show of each point.", default=20)
@click.option("--experts", is_flag=True, help="Of a mixture: which expert writes them, too. The texts are read twice.")
@click.option("--png", metavar="FILE", help="Draw the largest magnitude of each of these features, by layer.")
@click.option("--svg", metavar="FILE", help="The same as a vector picture.")
@click.option("--html", metavar="FILE", help="The same as a page that answers the mouse; one file, no network.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout, and no table.")
@chat_options
@loading
def command(
    model: str | None,
    points: str,
    layers: str,
    top: int,
    experts: bool,
    png: str | None,
    svg: str | None,
    html: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Find features of MODEL that are far larger than the others.

    Outlier features (Dettmers et al. 2022): a magnitude of 6 or more in 25 % of the layers and at 6 % of all positions.
    Massive activations (Sun et al. 2024): above 100, and 1,000 times the median magnitude of their text. The layers'
    share counts the layers that are read: read all of them. --experts: for each layer of a mixture, the largest
    magnitudes that each expert's output times its weight adds to the stream, and how often the router chose it.

    \b
    hookmap outliers HuggingFaceTB/SmolLM2-135M --prompts texts.jsonl --png outliers.png
    hookmap outliers allenai/OLMoE-1B-7B-0924 --experts --prompts texts.jsonl --svg outliers.svg

    The table goes to stderr, the JSON to stdout.
    """
    from hookmap.cli.settings import chosen_tensors, load_settings, refuse_unknown, typed_or_set

    settings = load_settings()
    how = templating(given, settings)
    prompts = chosen_prompts(given, settings, how.get("chat"))
    if prompts is None:
        raise click.UsageError("of which texts? Give --prompts FILE or --prompt TEXT")
    named, chosen = chosen_tensors({}, points, layers)
    refuse_unknown(named, chosen, model)
    one_prompt.check_pictures((png, svg, html))
    batches = typed_or_set(given, settings, "batch_size", "batch_tokens")
    hm = opened(model, given, quiet=as_json)
    found = hm.outliers(prompts, named, chosen, **batches, **how)
    by = hm.expert_outliers(prompts, chosen, **batches, **how) if experts else None

    def chart() -> Any:
        from hookmap.analysis import charts

        drawn = [charts.outlier_features(found, top)] if found.features or by is None else []
        drawn += [] if by is None else [charts.expert_outliers(by)]
        return drawn[0] if len(drawn) == 1 else charts.load_altair().vconcat(*drawn)

    one_prompt.save_pictures(chart, (png, svg, html))
    if as_json:
        more = {} if by is None else {"experts": {str(layer): own.as_json() for layer, own in by.items()}}
        click.echo(json.dumps({**found.as_json(), **more}, ensure_ascii=False))
        return
    _show(found, top)
    if by is not None:
        _show_experts(by, top)


def _show_experts(by: "dict[int, LayerExperts]", top: int) -> None:
    from hookmap.cli.console import console, table

    rows = [(layer, each) for layer, own in by.items() for each in own.as_json() if own.chosen[each["expert"]]]
    rows.sort(key=lambda row: -row[1]["largest"])
    shown = table("layer", "expert", ">largest", "to feature", ">tokens", ">mean weight")
    for layer, each in rows[:top]:
        size, share, weight = f"{each['largest']:.5g}", f"{each['share']:.1%}", f"{each['weight']:.3f}"
        shown.add_row(str(layer), str(each["expert"]), size, str(each["feature"]), share, weight)
    screen = console()
    screen.print("\n[bold]experts[/]  what each writes to the stream at the most: its output times its weight")
    screen.print(shown)
    if len(rows) > top:
        screen.print(f"[dim]{len(rows) - top} more: --top {len(rows)}[/]")


def _show(found: "OutlierFeatures", top: int) -> None:
    from hookmap.cli.console import console, table
    from hookmap.maps.describe import layers_text
    from hookmap.wording import counted

    screen = console()
    for point in found.points:
        own = found.of(point)
        if not own:
            screen.print(f"{point}: no outlier features, and no massive activations")
            continue
        shown = table(
            "feature",
            ">largest",
            "at layer",
            ">layers ≥ 6",
            ">positions ≥ 6",
            "outlier",
            ">massive",
            "in layers",
            ">on first tokens",
        )
        for each in own[:top]:
            held = [layer for layer in each.massive_layers if layer is not None]
            shown.add_row(
                str(each.feature),
                f"{each.largest:.5g}",
                "" if each.at is None else str(each.at),
                f"{each.layers:.0%}",
                f"{each.positions:.1%}",
                "yes" if each.outlier else "",
                f"{each.massive:.2%}" if each.massive else "",
                layers_text(held) if held else "",
                f"{each.sink:.0%}" if each.massive else "",
            )
        outlier, massive = sum(each.outlier for each in own), sum(each.massive > 0 for each in own)
        screen.print(f"\n[bold]{point}[/]  {counted(outlier, 'outlier feature')}, {massive} with massive activations")
        screen.print(shown)
        if len(own) > top:
            screen.print(f"[dim]{len(own) - top} more: --top {len(own)}[/]")
