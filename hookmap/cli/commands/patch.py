"""`hookmap patch`: a tensor of one prompt's run put into another's; or a sweep over layers and positions."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli import model_options, one_prompt
from hookmap.cli.chat_options import chat_options, templating
from hookmap.cli.options import calls_option, count

if TYPE_CHECKING:
    from hookmap.analysis.patching import Sweep
    from hookmap.loading.prompts import Prompt
    from hookmap.model import HookedModel


@click.command()
@click.argument("model", required=False)
@model_options.loading
@click.option("--clean", required=True, metavar="TEXT", help="The prompt whose values are taken.")
@click.option("--corrupted", required=True, metavar="TEXT", help="The prompt they are put into; it has as many tokens.")
@click.option(
    "--image",
    "images",
    metavar="FILE",
    multiple=True,
    help="An image before both texts, each in one message; repeatable. With --no-chat, the texts mark its place.",
)
@click.option(
    "--corrupted-image",
    "other_images",
    metavar="FILE",
    multiple=True,
    help="The same of the corrupted prompt, in place of --image.",
)
@click.option("--answer", metavar="TEXT", help="The beginning of the answer, appended to both prompts.")
@click.option("--point", default="resid_pre", show_default=True, metavar="NAME", help="Which tensor is patched.")
@click.option("--layers", default="all", show_default=True, metavar="LAYERS", help="8,12,16 or 0-3 or -1 or all.")
@calls_option
@click.option(
    "--source-calls",
    metavar="CALLS",
    help="Which runs the values are taken from, in order, or one for all.  [default: the same]",
)
@click.option("--positions", default="prompt", show_default=True, metavar="WHERE", help="Which tokens, as in capture.")
@click.option(
    "--sweep",
    is_flag=True,
    help="Patch each layer and position alone, and measure how far it restores the clean answer.",
)
@click.option("--target", metavar="TOKEN", help="Sweep: the next token of the clean prompt.")
@click.option(
    "--against",
    metavar="TOKEN",
    help="Sweep: the next token of the corrupted prompt; the metric is then the difference of logits.",
)
@count("--batch-size", default=32)
@click.option("-o", "--output", metavar="FILE", help="Sweep: write FILE.safetensors, FILE.csv and FILE.json.")
@click.option("--png", metavar="FILE", help="Sweep: write a heat map to FILE.")
@click.option("--html", metavar="FILE", help="Sweep: write an interactive heat map to FILE, self-contained.")
@count("--max-new-tokens", default=32)
@chat_options
def command(
    model: str | None,
    clean: str,
    corrupted: str,
    images: tuple[str, ...],
    other_images: tuple[str, ...],
    answer: str | None,
    point: str,
    layers: str,
    calls: str | None,
    source_calls: str | None,
    positions: str,
    sweep: bool,
    target: str | None,
    against: str | None,
    batch_size: int,
    output: str | None,
    png: str | None,
    html: str | None,
    max_new_tokens: int,
    **given: Any,
) -> None:
    """Put one run's tensor into another's.

    Prints what MODEL says for the clean prompt, for the corrupted one, and for that with the clean tensor put in. With
    --sweep, each layer and position is patched alone, and a table says how far the answer comes back: 0 as corrupted,
    1 as clean.

    \b
    hookmap patch --clean "He buys 4 more." --corrupted "He buys 5 more." --point resid_mid --layers 8
    hookmap patch --clean … --corrupted … --answer "Tom has 3+" --sweep --target 4 --against 5 --png sweep.png

    Texts, and the name of the file that -o wrote, go to stdout; the table goes to stderr.
    """
    from hookmap.cli.parsing import parse_calls, parse_layers
    from hookmap.cli.settings import load_settings, refuse_unknown

    if sweep and not target:
        raise click.UsageError("a sweep needs the token to look for: --target TOKEN (and --against TOKEN)")
    if not sweep and (target or against or output or png or html):
        raise click.UsageError("--target, --against, -o, --png and --html are of a sweep: add --sweep")
    where: dict[str, Any] = {"point": point, "layers": parse_layers(layers), "positions": positions}
    where |= {"calls": parse_calls(calls or "all")}
    source = None if source_calls is None else parse_calls(source_calls, "--source-calls")
    if other_images and not images:
        raise click.UsageError("--corrupted-image stands in the place of --image: which is the clean prompt's?")
    refuse_unknown(point, where["layers"], model, where["calls"], positions=positions)
    one_prompt.check_pictures((png, html))
    how = templating(given, load_settings())
    hm = model_options.opened(model, given, quiet=False)
    pairs = ((clean, images), (corrupted, other_images or images))
    prompts = [one_prompt.read(hm, text, files, answer, how) for text, files in pairs]
    if not sweep:
        _patch(hm, prompts, where, source, max_new_tokens)
        return
    found = _sweep(hm, prompts, str(target), against, {**where, "source_calls": source, "batch_size": batch_size})
    _show(found)

    def chart() -> Any:
        from hookmap.analysis.charts import heat_map

        return heat_map(found.effect)

    one_prompt.save_pictures(chart, (png, html))
    if output:
        click.echo(str(found.save(output)))


def _patch(
    hm: "HookedModel", prompts: "list[Prompt]", where: dict[str, Any], source_calls: Any, max_new_tokens: int
) -> None:
    from tempfile import TemporaryDirectory

    from hookmap.cli.console import working

    with working("generating"), TemporaryDirectory() as folder:
        store = f"{folder}/clean"  # a document has no place for what a processor made of a prompt
        hm.capture([prompts[0]], [where["point"]], max_new_tokens=0, store=store)
        patch = {"do": "patch", **where, "source": {"store": store, "calls": source_calls}}
        patched = hm.generate([prompts[1]], [patch], None, max_new_tokens).texts
        plain = [hm.generate([prompt], (), None, max_new_tokens).texts[0] for prompt in prompts]
    for name, text in zip(("clean", "corrupted", "patched"), [*plain, *patched], strict=True):
        click.echo(f"{click.style(f'{name:10}', fg='cyan')} {text}")


def _sweep(
    hm: "HookedModel", prompts: "list[Prompt]", target: str, against: str | None, options: dict[str, Any]
) -> "Sweep":
    from hookmap.analysis.patching import sweep
    from hookmap.cli.console import progress

    with progress() as bars:
        bar = bars.add_task("patches", total=None)

        def show(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total)

        return sweep(hm, [prompts[0]], [prompts[1]], target, against, progress=show, **options)


def _show(found: "Sweep", columns: int = 12) -> None:
    """The positions with the largest effects, in the order of the text."""
    from hookmap.analysis.grid_table import grid_table
    from hookmap.cli.console import console

    effect, told = found.effect, found.above_noise
    largest = effect.values.abs().nan_to_num(0).amax(0)
    most = sorted(largest.argsort(descending=True)[:columns].tolist())
    shown = replace(
        effect,
        values=effect.values[:, most],
        positions=tuple(effect.positions[n] for n in most),
        tokens=tuple(effect.tokens[n] for n in most),
    )
    screen = console()
    screen.print(grid_table(shown, told=told[:, most].tolist()))
    screen.print(f"clean {found.clean:.3f}, corrupted {found.corrupted:.3f}; point {effect.point}", highlight=False)
    if within := int((~told).sum()):
        screen.print(
            f"{within} of {told.numel()} effects are in the metric's noise, {found.noise:.2g}: in brackets",
            highlight=False,
        )
    if others := [float(value) for n, value in enumerate(largest.tolist()) if n not in most]:
        screen.print(f"{len(others)} other positions: {max(others):.2f} at most")
