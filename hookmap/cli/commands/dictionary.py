"""`hookmap dictionary`: sparse autoencoders and transcoders."""

import json
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli.chat_options import chat_options, templating
from hookmap.cli.model_options import loading, opened
from hookmap.cli.options import count, option_group
from hookmap.cli.prompts_file import chosen_prompts, prompt_options

if TYPE_CHECKING:
    from hookmap.analysis.dictionaries.dictionary import Dictionary

_WHERE = option_group(
    click.option("--folder", default="", metavar="NAME", help="The folder in a hub id's repository."),
    click.option("--point", metavar="NAME", help="Where it was trained, in place of what its files say."),
    click.option("--layer", type=click.IntRange(min=0), metavar="N", help="The same of the layer."),
)


@click.group()
def command() -> None:
    """Look at sparse autoencoders and transcoders, and evaluate them.

    DICTIONARY is a folder or a hub id: of SAELens, dictionary_learning, Gemma Scope, or plain safetensors.
    """


@command.command()
@click.argument("dictionary", metavar="DICTIONARY")
@_WHERE
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON on stdout, and no table.")
def show(dictionary: str, folder: str, point: str | None, layer: int | None, as_json: bool) -> None:
    """Say what DICTIONARY is: its size, its architecture, where it was trained."""
    found = _loaded(dictionary, folder, point, layer)
    facts = _facts(found)
    if as_json:
        click.echo(json.dumps(facts))
        return
    from hookmap.cli.console import console, table

    rows = table("", "")
    for name, value in facts.items():
        if value is not None:
            rows.add_row(name.replace("_", " "), str(value))
    console().print(rows)


@command.command()
@click.argument("dictionary", metavar="DICTIONARY")
@click.argument("model", required=False)
@_WHERE
@prompt_options
@count("--batch-size", "How many texts run together.")
@count("--batch-tokens", "How many tokens are read at once.  [default: 4096]")
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON on stdout, and no table.")
@chat_options
@loading
def evaluate(
    dictionary: str,
    model: str | None,
    folder: str,
    point: str | None,
    layer: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Evaluate DICTIONARY on texts that MODEL reads, by SAEBench's core metrics.

    Loss recovered, explained variance, L0, dead features. MODEL runs three times over the texts: as it is, with the
    reconstruction in place of the point, and with zeros there.

    \b
    hookmap dictionary evaluate sae Qwen/Qwen3-0.6B --prompts texts.jsonl
    """
    from hookmap.cli.settings import load_settings, typed_or_set

    settings = load_settings()
    how = templating(given, settings)
    prompts = chosen_prompts(given, settings, how.get("chat"))
    if prompts is None:
        raise click.UsageError("on which texts? Give --prompts FILE or --prompt TEXT")
    batches = typed_or_set(given, settings, "batch_size", "batch_tokens")
    found = _loaded(dictionary, folder, point, layer)
    hm = opened(model, given, quiet=as_json)
    from hookmap.analysis.dictionaries.evaluating import evaluate as evaluated

    metrics = evaluated(hm, prompts, found, **batches, **how)
    if as_json:
        click.echo(json.dumps({**_facts(found), **metrics.as_json()}))
        return
    from hookmap.cli.console import console, table

    screen, rows = console(), table("SAEBench core", ">")
    for name, value in (
        ("loss recovered (ce_loss_score)", f"{metrics.ce_loss_score:.4f}"),
        (
            "loss: without, with, zeros",
            f"{metrics.ce_loss_without_sae:.4f}, {metrics.ce_loss_with_sae:.4f}, {metrics.ce_loss_with_ablation:.4f}",
        ),
        ("explained variance", f"{metrics.explained_variance:.4f}"),
        ("cosine, norm ratio", f"{metrics.cossim:.4f}, {metrics.l2_ratio:.4f}"),
        ("L0", f"{metrics.l0:.2f}"),
        ("dead features here", f"{metrics.dead:.2%}"),
    ):
        rows.add_row(name, value)
    screen.print(rows)
    screen.print(f"[dim]{metrics.tokens} tokens[/]")


def _loaded(source: str, folder: str, point: str | None, layer: int | None) -> "Dictionary":
    from hookmap.cli.console import working

    with working("importing torch", quiet=True):
        from hookmap.analysis.dictionaries.loading import load_dictionary
    return load_dictionary(source, folder=folder, point=point, layer=layer)


def _facts(found: "Dictionary") -> dict[str, Any]:
    from hookmap.stores.ledger import tensor_name

    about = found.about
    known = about.point is not None
    return {
        "reads": tensor_name(found.reads) if known else None,
        "writes": tensor_name(found.writes) if known and found.transcoder else None,
        "features": found.features,
        "d_in": found.d_in,
        "d_out": found.d_out if found.transcoder else None,
        "architecture": about.kind,
        "activation": found.activation,
        "k": found.k,
        "program": about.program,
        "model": about.model,
        "prepend_bos": about.prepend_bos,
        "context": about.context,
    }
