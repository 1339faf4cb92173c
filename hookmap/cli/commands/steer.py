"""`hookmap steer`: what a model says with a vector added to one of its points, and without."""

import json
from typing import Any

import click

from hookmap.cli import model_options, one_prompt
from hookmap.cli.chat_options import chat_options, of_default_prompt, tell, templating
from hookmap.cli.image_option import image_option, of_one_text
from hookmap.cli.options import calls_option, count

_OF_VECTOR = ("key", "point", "layers", "calls", "strength", "keep_norm", "positions", "steps")


@click.command()
@click.argument("model", required=False)
@model_options.loading
@click.option(
    "--vector", metavar="FILE", help="A file that `hookmap vector` wrote; or any .safetensors file, with --key."
)
@click.option(
    "--key", metavar="NAME", help="The tensor of the file that all layers use.  [default: each layer has its own]"
)
@click.option("--point", metavar="NAME", help="The point it is added to.  [default: that of the file, or resid_post]")
@click.option("--layers", metavar="LAYERS", help="8,12,16 or 0-3 or -1 or all.  [default: all layers in the file]")
@calls_option
@click.option("--strength", type=float, default=1.0, show_default=True, help="The factor of the vector.")
@click.option("--keep-norm", is_flag=True, help="Scale each row back to the norm that it had.")
@click.option("--positions", default="all", show_default=True, metavar="WHERE", help="Which tokens, as in capture.")
@click.option("--steps", metavar="STEPS", help="Which steps: 0 for the prompt, 1: for what is generated.")
@click.option("--intervene", metavar="FILE", help="Apply the interventions in this JSON or YAML file instead.")
@click.option("--prompt", "texts", metavar="TEXT", multiple=True, help="A prompt; may be given several times.")
@image_option
@count("--max-new-tokens", default=64)
@chat_options
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, and no table.")
def command(
    model: str | None,
    vector: str | None,
    key: str | None,
    point: str | None,
    layers: str | None,
    calls: str | None,
    strength: float,
    keep_norm: bool,
    positions: str,
    steps: str | None,
    intervene: str | None,
    texts: tuple[str, ...],
    images: tuple[str, ...],
    max_new_tokens: int,
    as_json: bool,
    **given: Any,
) -> None:
    """Generate with a vector added, and without.

    \b
    hookmap steer --vector happy.safetensors --layers 8 --strength 4 --prompt "How are you?"
    hookmap steer --intervene edits.yaml --prompt "How are you?"

    Both texts go to stdout.
    """
    from hookmap.cli.parsing import parse_calls, parse_layers
    from hookmap.cli.settings import load_settings, refuse_unknown

    if (vector is None) == (intervene is None):
        raise click.UsageError("which vector? --vector FILE, or a file of interventions: --intervene FILE")
    source, typed_in = click.get_current_context().get_parameter_source, click.core.ParameterSource.COMMANDLINE
    if intervene and (typed := [option for option in _OF_VECTOR if source(option) is typed_in]):
        told = ", ".join(f"--{option.replace('_', '-')}" for option in typed)
        raise click.UsageError(f"{told}: of --vector. The file of --intervene says all of it itself.")
    chosen = None if layers is None else parse_layers(layers)
    where: dict[str, Any] = {"positions": positions, "steps": steps, "keep_norm": keep_norm}
    where |= {} if calls is None else {"calls": parse_calls(calls)}
    if intervene:
        from hookmap.capture.interventions.documents import load_interventions

        interventions: Any = load_interventions(intervene)
    elif key:
        file = {"file": vector, "key": key}
        where |= {"point": point or "resid_post", "layers": "all" if chosen is None else chosen}
        interventions = [{"do": "steer", "vector": file, "strength": strength, **where}]
    else:
        from hookmap.analysis.gguf import open_vector

        made = open_vector(str(vector))
        where |= {"point": point} if point else {}
        interventions = made.interventions(strength, None if chosen in (None, "all") else chosen, **where)  # type: ignore[arg-type]
    refuse_unknown(point or (), positions=positions)
    shown = list(texts) or [one_prompt.DEFAULT_PROMPT]
    how = templating(given, load_settings())
    prompts = of_one_text(texts, images, how.get("chat")) if images else shown
    hm = model_options.opened(model, given, quiet=as_json)
    tell(hm.tokenizer, how, bool(texts) and not images)
    how = how if texts else of_default_prompt(hm.tokenizer, how)
    from hookmap.cli.console import working

    with working("generating", quiet=as_json):
        both = [hm.generate(prompts, written, None, max_new_tokens, **how).texts for written in ((), interventions)]
    _show(list(zip(shown, *both, strict=True)), as_json)


def _show(rows: list[tuple[str, ...]], as_json: bool) -> None:
    """(prompt, text without, text with) of each prompt."""
    if as_json:
        found = [{"prompt": text, "without": before, "with": after} for text, before, after in rows]
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for text, before, after in rows:
        click.echo(f"{click.style(text, bold=True)}\n{click.style('without', dim=True)} {before}")
        click.echo(f"{click.style('with', fg='cyan')}    {after}\n")
