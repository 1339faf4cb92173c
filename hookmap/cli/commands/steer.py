"""`hookmap steer`: what a model says with a vector added to one of its points, and without."""

from typing import TYPE_CHECKING, Any

import click

from hookmap.cli.opening import model_options

if TYPE_CHECKING:
    from hookmap.model import HookedModel

DEFAULT_PROMPT = "Tom has 3 apples. He buys 4 more. How many apples does Tom have?"


@click.command()
@model_options
@click.option("--vector", metavar="FILE", help="A .safetensors file that holds the vector.")
@click.option("--key", metavar="NAME", help="Which tensor of the file.  [default: the only one]")
@click.option("--point", default="resid_post", show_default=True, metavar="NAME", help="Where it is added.")
@click.option("--layers", metavar="LAYERS", help="On which layers: 8,12,16 or 0-3 or -1 or all.  [default: all]")
@click.option("--strength", type=float, default=1.0, show_default=True, help="The vector is multiplied by it.")
@click.option("--keep-norm", is_flag=True, help="Bring each row back to the length that it had.")
@click.option("--positions", default="all", show_default=True, metavar="WHERE", help="At which tokens; see capture.")
@click.option("--steps", metavar="STEPS", help="In which steps: 0 for the prompt, 1: for what is generated.")
@click.option("--intervene", metavar="FILE", help="These interventions instead: a JSON or YAML file.")
@click.option("--prompt", "texts", metavar="TEXT", multiple=True, help="A prompt; may be given several times.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, metavar="N")
@click.option("--chat/--no-chat", default=None, help="Through the chat template.  [default: if there is one]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, and no table.")
def command(
    model: str | None,
    vector: str | None,
    key: str | None,
    point: str,
    layers: str | None,
    strength: float,
    keep_norm: bool,
    positions: str,
    steps: str | None,
    intervene: str | None,
    texts: tuple[str, ...],
    max_new_tokens: int,
    chat: bool | None,
    as_json: bool,
    **opening: Any,
) -> None:
    """Generate with MODEL while a vector is added to a point, and without, side by side.

    \b
    hookmap steer --vector happy.safetensors --layers 8 --strength 4 --prompt "How are you?"
    hookmap steer --intervene edits.yaml --prompt "How are you?"
    """
    from hookmap.cli.opening import open_model
    from hookmap.cli.settings import load_settings, parse_layers

    settings = load_settings()
    if (vector is None) == (intervene is None):
        raise click.UsageError("which vector? --vector FILE, or a file of interventions: --intervene FILE")
    if intervene:
        from hookmap.interventions import load_interventions

        interventions: Any = load_interventions(intervene)
    else:
        where = {"point": point, "layers": parse_layers(layers or "all"), "positions": positions, "steps": steps}
        file = {"file": vector, "key": key or _only_key(str(vector))}
        interventions = [{"do": "steer", **where, "vector": file, "strength": strength, "keep_norm": keep_norm}]
    hm = open_model(model, opening, settings)
    _show(hm, list(texts) or [DEFAULT_PROMPT], interventions, max_new_tokens, chat, as_json)


def _only_key(file: str) -> str:
    from hookmap.vectors import keys_of

    held = keys_of(file)
    if len(held) != 1:
        raise click.UsageError(f"{file} holds {len(held)} tensors ({', '.join(held[:10])}): say which with --key")
    return held[0]


def _show(
    hm: "HookedModel", texts: list[str], interventions: Any, max_new_tokens: int, chat: bool | None, as_json: bool
) -> None:
    import json

    from rich.markup import escape

    from hookmap.cli.console import console, working
    from hookmap.cli.opening import chat_text

    prompts = [chat_text(hm, text, chat) for text in texts]
    with working("generating", quiet=as_json):
        with_them = hm.generate(prompts, interventions, None, max_new_tokens).texts
        without = hm.generate(prompts, (), None, max_new_tokens).texts
    if as_json:
        rows = zip(texts, without, with_them, strict=True)
        found = [{"prompt": text, "without": before, "with": after} for text, before, after in rows]
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    screen = console(stderr=False)
    for text, before, after in zip(texts, without, with_them, strict=True):
        screen.print(f"[bold]{escape(text)}[/]")
        screen.print(f"[dim]without[/] {escape(before)}")
        screen.print(f"[cyan]with[/]    {escape(after)}\n")
