"""`hookmap verify`: does the map tell the truth about the model?"""

import json
from typing import TYPE_CHECKING

import click

from hookmap.cli import model_options

if TYPE_CHECKING:
    from hookmap.discovery.discover import Part
    from hookmap.verification.verify import Verification


@click.command()
@click.argument("model", required=False)
@click.option("--map", "map_", metavar="MAP", help="Check this map instead of the one that discovery makes.")
@click.option(
    "--part",
    type=click.Choice(("text", "vision")),
    default="text",
    show_default=True,
    help="The language model, or the tower that reads pictures; a given map says itself which part it is of.",
)
@click.option(
    "--random",
    "random_weights",
    is_flag=True,
    help="Use a narrow copy of MODEL with random weights; nothing is downloaded.",
)
@click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of the input and of the random weights.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout, and no table.")
@model_options.trust_remote_code
def command(
    model: str | None,
    map_: str | None,
    part: "Part",
    random_weights: bool,
    seed: int,
    as_json: bool,
    trust_remote_code: bool | None,
) -> None:
    """Run MODEL and check its map with numbers.

    Plain PyTorch hooks read every point, and are held against Hugging Face's hidden states, the sums of the block, the
    order of the forward pass, and causes: other weights in a branch must move what comes after it, and nothing else.

    \b
    hookmap verify path/to/model
    hookmap verify Qwen/Qwen3-0.6B --random
    hookmap verify Qwen/Qwen3-VL-4B-Instruct --part vision

    The table goes to stderr, the JSON to stdout. Exit code 1 if any check fails.
    """
    from hookmap.cli.console import working
    from hookmap.cli.settings import choose_model, load_settings

    settings = load_settings()
    model = choose_model(model, settings)
    map_ = map_ or settings.get("map")
    with working(f"verifying {model}", quiet=as_json):
        import hookmap

        result = hookmap.verify(
            model,
            architecture_map=hookmap.load_map(map_) if map_ else None,
            part=part,
            random_weights=random_weights,
            trust_remote_code=model_options.trusted(trust_remote_code, settings),
            seed=seed,
        )
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2, ensure_ascii=False))
    else:
        _show(result)
    if not result.passed:
        click.get_current_context().exit(1)


def _show(result: "Verification") -> None:
    from rich.markup import escape

    from hookmap.cli.console import console, table
    from hookmap.maps.describe import layer_ranges

    screen = console()
    screen.print(f"\n[bold]{result.architecture_map.architecture}[/]  [dim]on {escape(result.on)}[/]\n")
    rows = table("", "check", "layers", ">error", "what")
    for check in result.checks:
        mark = "[green]✓[/]" if check.passed else "[red]✗[/]"
        error = "" if check.error is None else f"{check.error:.1e}"
        rows.add_row(mark, check.name, layer_ranges(check.layers), error, escape(check.detail))
    screen.print(rows)
    failed = sum(not check.passed for check in result.checks)
    verdict = "[red]the map is wrong about this model[/]" if failed else "[green]the map tells the truth[/]"
    if not result.checks:
        verdict = "[red]nothing could be checked[/]"
    screen.print(f"\n{len(result.checks) - failed} of {len(result.checks)} checks passed: {verdict}\n")
