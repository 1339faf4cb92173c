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
    from hookmap.analysis.outliers import OutlierFeatures


@click.command()
@click.argument("model", required=False)
@click.option("--points", default="resid_post", show_default=True, metavar="NAMES", help="Features of which tensors.")
@click.option("--layers", default="all", show_default=True, metavar="LAYERS", help="8,12,16 or 0-3 or -1 or all.")
@prompt_options
@count("--batch-size", "How many texts run together.")
@count("--batch-tokens", "How many tokens are read at once.  [default: 4096]")
@count("--top", "How many features to show of each point.", default=20)
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
    png: str | None,
    svg: str | None,
    html: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Find features of MODEL that are far larger than the others.

    Outlier features (Dettmers et al. 2022): a magnitude of 6 or more in 25 % of the layers and at 6 % of all positions.
    Massive activations (Sun et al. 2024): above 100, and 1,000 times the median magnitude of their text. The layers'
    share counts the layers that are read: read all of them.

    \b
    hookmap outliers HuggingFaceTB/SmolLM2-135M --prompts texts.jsonl --png outliers.png

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
    found = opened(model, given, quiet=as_json).outliers(prompts, named, chosen, **batches, **how)

    def chart() -> Any:
        from hookmap.analysis.charts import outlier_features

        return outlier_features(found, top)

    one_prompt.save_pictures(chart, (png, svg, html))
    if as_json:
        click.echo(json.dumps(found.as_json(), ensure_ascii=False))
    else:
        _show(found, top)


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
