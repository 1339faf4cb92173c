"""`hookmap patch`: a tensor of one prompt's run put into another's; or a sweep over layers and positions."""

from typing import TYPE_CHECKING, Any

import click

from hookmap.cli import model_options, one_prompt, sweeping
from hookmap.cli.chat_options import chat_options, templating
from hookmap.cli.options import calls_option, count

if TYPE_CHECKING:
    from hookmap.loading.prompts import Prompt
    from hookmap.model import HookedModel


@click.command()
@click.argument("model", required=False)
@model_options.loading
@click.option("--clean", metavar="TEXT", help="The prompt whose values are taken.")
@click.option("--corrupted", metavar="TEXT", help="The prompt they are put into; it has as many tokens.")
@click.option(
    "--pairs",
    metavar="FILE",
    help='Sweep over many pairs, in place of --clean and --corrupted: a data set of {"clean": …, "corrupted": …, '
    '"answer": …, "wrong": …}.',
)
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
@sweeping.options
@count("--max-new-tokens", default=32)
@chat_options
def command(
    model: str | None,
    clean: str | None,
    corrupted: str | None,
    pairs: str | None,
    images: tuple[str, ...],
    other_images: tuple[str, ...],
    answer: str | None,
    point: str,
    layers: str,
    calls: str | None,
    source_calls: str | None,
    positions: str,
    sweep: bool,
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
    hookmap patch --pairs ioi.jsonl --point z --over heads --png heads.png -o ioi

    With --pairs the effect is a ratio of means over all pairs, with its bootstrap interval. Texts, and the name of the
    file that -o wrote, go to stdout; tables go to stderr.
    """
    from hookmap.cli.parsing import parse_calls, parse_layers, parse_list
    from hookmap.cli.settings import load_settings, refuse_unknown

    chosen = sweeping.read(given, sweep or pairs is not None)
    if (pairs is None) != (clean is not None) or (pairs is None) != (corrupted is not None):
        raise click.UsageError("which prompts? --clean TEXT and --corrupted TEXT, or --pairs FILE")
    if pairs and (typed := [n for n, v in (("image", images), ("answer", answer), *_of_one(chosen)) if v]):
        raise click.UsageError(f"--{', --'.join(typed)}: of --clean and --corrupted; pairs have their own")
    if sweep and not pairs and not chosen["target"] and chosen["metric"] not in ("kl_divergence", "loss"):
        raise click.UsageError("a sweep needs the token to look for: --target TOKEN (and --against TOKEN)")
    points = parse_list(point) if sweep or pairs else point
    where: dict[str, Any] = {"point": points, "layers": parse_layers(layers), "positions": positions}
    where |= {"calls": parse_calls(calls or "all")}
    source = None if source_calls is None else parse_calls(source_calls, "--source-calls")
    if other_images and not images:
        raise click.UsageError("--corrupted-image stands in the place of --image: which is the clean prompt's?")
    refuse_unknown(points, where["layers"], model, where["calls"], positions=positions)
    one_prompt.check_pictures((chosen["png"], chosen["html"]))
    read = sweeping.read_pairs(pairs) if pairs else None
    how = templating(given, load_settings())
    hm = model_options.opened(model, given, quiet=False)
    where |= {"source_calls": source}
    if read is not None:
        sweeping.finish(sweeping.run(hm, (read,), {**where, **how}, chosen), chosen, one_prompt.save_pictures)
        return
    both = ((str(clean), images), (str(corrupted), other_images or images))
    prompts = [one_prompt.read(hm, text, files, answer, how) for text, files in both]
    if sweep:
        found = sweeping.run(hm, ([prompts[0]], [prompts[1]]), where, chosen)
        sweeping.finish(found, chosen, one_prompt.save_pictures)
    else:
        _patch(hm, prompts, where, max_new_tokens)


def _of_one(chosen: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, chosen[name]) for name in ("target", "against")]


def _patch(hm: "HookedModel", prompts: "list[Prompt]", where: dict[str, Any], max_new_tokens: int) -> None:
    from tempfile import TemporaryDirectory

    from hookmap.cli.console import working

    with working("generating"), TemporaryDirectory() as folder:
        store = f"{folder}/clean"  # a document has no place for what a processor made of a prompt
        hm.capture([prompts[0]], [where["point"]], max_new_tokens=0, store=store)
        at = {name: where[name] for name in ("point", "layers", "calls", "positions")}
        patch = {"do": "patch", **at, "source": {"store": store, "calls": where["source_calls"]}}
        patched = hm.generate([prompts[1]], [patch], None, max_new_tokens).texts
        plain = [hm.generate([prompt], (), None, max_new_tokens).texts[0] for prompt in prompts]
    for name, text in zip(("clean", "corrupted", "patched"), [*plain, *patched], strict=True):
        click.echo(f"{click.style(f'{name:10}', fg='cyan')} {text}")
