"""`hookmap patch`: a tensor of one prompt's run put into another's; or a sweep over layers and positions."""

from typing import TYPE_CHECKING, Any

import click

from hookmap.cli.opening import model_options

if TYPE_CHECKING:
    from hookmap.model import HookedModel
    from hookmap.patching import Sweep


@click.command()
@model_options
@click.option("--clean", required=True, metavar="TEXT", help="The prompt that values are taken from.")
@click.option("--corrupted", required=True, metavar="TEXT", help="The prompt that they are put into, equally long.")
@click.option("--prefix", default="", metavar="TEXT", help="The beginning of the answer, the same for both.")
@click.option("--point", default="resid_pre", show_default=True, metavar="NAME", help="Which tensor is patched.")
@click.option("--layers", default="all", show_default=True, metavar="LAYERS", help="Of which layers: 8,12,16 or 0-3.")
@click.option("--positions", default="prompt", show_default=True, metavar="WHERE", help="At which tokens; see capture.")
@click.option("--sweep", is_flag=True, help="Each layer and position in turn: how far does each bring the answer back?")
@click.option("--answer", metavar="TOKEN", help="Sweep: the clean prompt's next token.")
@click.option("--wrong", metavar="TOKEN", help="Sweep: the corrupted one's; then logits are compared.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, metavar="N")
@click.option("-o", "--output", metavar="FILE", help="Sweep: write FILE.safetensors, FILE.csv and FILE.json.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True, metavar="N")
@click.option("--chat/--no-chat", default=None, help="Through the chat template.  [default: if there is one]")
def command(
    model: str | None,
    clean: str,
    corrupted: str,
    prefix: str,
    point: str,
    layers: str,
    positions: str,
    sweep: bool,
    answer: str | None,
    wrong: str | None,
    batch_size: int,
    output: str | None,
    max_new_tokens: int,
    chat: bool | None,
    **opening: Any,
) -> None:
    """Put a tensor of the clean prompt's run into the corrupted one's.

    Prints what MODEL says for both prompts and for the patched one. With --sweep, each layer and position is patched
    alone, and the table says how far the answer comes back: 0 as corrupted, 1 as clean.

    \b
    hookmap patch --clean "He buys 4 more." --corrupted "He buys 5 more." --point resid_mid --layers 8
    hookmap patch --clean … --corrupted … --prefix "Tom has 3+" --sweep --answer 4 --wrong 5 -o sweep
    """
    from hookmap.cli.opening import chat_text, open_model
    from hookmap.cli.settings import load_settings, parse_layers

    if sweep and not answer:
        raise click.UsageError("a sweep needs the token to look for: --answer TOKEN (and --wrong TOKEN)")
    if not sweep and (answer or wrong or output):
        raise click.UsageError("--answer, --wrong and -o are of a sweep: add --sweep")
    chosen = parse_layers(layers)
    hm = open_model(model, opening, load_settings())
    texts = [chat_text(hm, text, chat, prefix) for text in (clean, corrupted)]
    if sweep:
        _sweep(hm, texts, str(answer), wrong, output, point, chosen, positions, batch_size)
    else:
        _patch(hm, texts, point, chosen, positions, max_new_tokens)


def _patch(hm: "HookedModel", texts: list[str], point: str, layers: Any, positions: str, max_new_tokens: int) -> None:
    from rich.markup import escape

    from hookmap.cli.console import console, working

    patch = {"do": "patch", "point": point, "layers": layers, "positions": positions, "source": {"prompt": texts[0]}}
    with working("generating"):
        patched = hm.generate(texts[1], [patch], None, max_new_tokens).texts
        plain = [hm.generate(text, (), None, max_new_tokens).texts[0] for text in texts]
    screen = console(stderr=False)
    for name, text in zip(("clean", "corrupted", "patched"), [*plain, *patched], strict=True):
        screen.print(f"[cyan]{name:10}[/] {escape(text)}")


def _sweep(
    hm: "HookedModel",
    texts: list[str],
    answer: str,
    wrong: str | None,
    output: str | None,
    point: str,
    layers: Any,
    positions: str,
    batch_size: int,
) -> None:
    from hookmap.cli.console import progress
    from hookmap.patching import sweep

    with progress() as bars:
        bar = bars.add_task("patches", total=None)
        found = sweep(
            hm,
            texts[0],
            texts[1],
            answer,
            wrong,
            point=point,
            layers=layers,
            positions=positions,
            batch_size=batch_size,
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    _show(found)
    if output:
        click.echo(str(found.save(output)))


def _show(found: "Sweep", columns: int = 12) -> None:
    """The positions with the largest effects, in the order of the text."""
    from rich.markup import escape

    from hookmap.cli.console import console, table

    effect = found.effect
    screen = console()
    screen.print(f"\n{escape(effect.metric)}")
    screen.print(f"[dim]clean {found.clean:.3f}, corrupted {found.corrupted:.3f}; point {effect.point}[/]\n")
    largest = effect.values.abs().amax(0)
    most = sorted(largest.argsort(descending=True)[:columns].tolist())
    shown = table(">layer", *(f">{effect.positions[n]} {escape(repr(effect.tokens[n]))}" for n in most))
    for layer, row in zip(effect.layers, effect.values.tolist(), strict=True):
        shown.add_row(str(layer), *(_cell(row[n]) for n in most))
    screen.print(shown)
    if len(most) < len(effect.positions):
        screen.print(f"[dim]{len(effect.positions) - len(most)} other positions: {_rest(largest, most):.2f} at most[/]")


def _cell(value: float) -> str:
    text = f"{value:.2f}"
    return f"[bold]{text}[/]" if abs(value) >= 0.5 else text if abs(value) >= 0.05 else f"[dim]{text}[/]"


def _rest(largest: Any, shown: list[int]) -> float:
    return max(float(value) for number, value in enumerate(largest.tolist()) if number not in shown)
