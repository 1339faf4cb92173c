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
    from hookmap.analysis.dictionaries.trainer import Progressed

_WHERE = option_group(
    click.option("--folder", default="", metavar="NAME", help="The folder in a hub id's repository."),
    click.option("--point", metavar="NAME", help="Where it was trained, in place of what its files say."),
    click.option("--layer", type=click.IntRange(min=0), metavar="N", help="The same of the layer."),
)


@click.group()
def command() -> None:
    """Read, evaluate and train sparse autoencoders.

    DICTIONARY is a folder or a hub id: of SAELens, dictionary_learning, Gemma Scope, circuit-tracer, or plain
    safetensors.
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
@count("--skip-first", "Tokens at the start of each text that keep their rows.  [default: as trained]", least=0)
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
    skip_first: int | None,
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

    metrics = evaluated(hm, prompts, found, skip=skip_first, **batches, **how)
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
    but = f", without the first {metrics.skip} of each text" if metrics.skip else ""
    screen.print(f"[dim]{metrics.tokens} tokens{but}[/]")


@command.command()
@click.argument("model", required=False)
@prompt_options
@click.option("--store", "capture", metavar="DIR", help="Train on the rows of this capture, and run no model.")
@click.option("--point", default="resid_post", show_default=True, metavar="NAME", help="What it reads.")
@click.option("--layer", type=click.IntRange(min=0), metavar="N", help="Of which layer.")
@click.option("--kind", type=click.Choice(["topk", "jumprelu"]), default="topk", show_default=True)
@count("--features", "How many features.  [default: 8 for each number of a row]")
@count("--k", "Active features of a token: exactly, or of jumprelu on average.  [default: 32]")
@count("--passes", "Over all texts.  [default: 1]")
@count("--batch-rows", "Rows of a step.  [default: 1024]")
@click.option("--learning-rate", type=float, metavar="X", help="[default: 2e-4 for 16,384 features, more for fewer]")
@count("--buffer-rows", "Rows that are shuffled together.  [default: 65536]")
@count("--skip-first", "Tokens at the start of each text that are left out.  [default: 1]", least=0)
@click.option("--training-seed", type=int, default=0, show_default=True, metavar="N", help="Of weights and orders.")
@click.option("-o", "--output", required=True, metavar="DIR", help="The folder for the dictionary, as SAELens's files.")
@click.option("--resume", is_flag=True, help="Go on with the training in DIR.")
@count("--batch-size", "How many texts run together.")
@count("--batch-tokens", "How many tokens are read at once.  [default: 4096]")
@chat_options
@loading
def train(model: str | None, capture: str | None, output: str, resume: bool, **given: Any) -> None:
    """Train a sparse autoencoder on what MODEL computes while it reads texts, or on a capture.

    No row is written to disk but the capture's own. A killed run goes on with --resume, and gives the same numbers.

    \b
    hookmap dictionary train Qwen/Qwen3-0.6B --prompts texts.jsonl --layer 14 -o sae
    hookmap dictionary train --store captures/0001 --layer 14 --kind jumprelu -o sae
    """
    from hookmap.cli.console import console
    from hookmap.cli.settings import load_settings, typed_or_set

    settings = load_settings()
    how = templating(given, settings)
    names = ("kind", "features", "k", "passes", "batch_rows", "learning_rate", "buffer_rows", "training_seed")
    chosen = {name: value for name in names if (value := given.pop(name)) is not None}
    if (skip := given.pop("skip_first")) is not None:
        chosen["skip"] = skip
    point, layer = given.pop("point"), given.pop("layer")
    prompts = chosen_prompts(given, settings, how.get("chat"))
    if (prompts is None) == (capture is None):
        raise click.UsageError("on what? Give texts (--prompts FILE, --prompt TEXT) or a capture (--store DIR)")
    screen = console()

    def tell(state: "Progressed") -> None:
        screen.print(
            f"[dim]{state.rows} rows: explained variance {state.explained_variance:.3f}, L0 {state.l0:.1f}, "
            f"dead {state.dead:.1%}[/]"
        )

    chosen |= {"store": output, "resume": resume, "tell": tell}
    if capture is not None:
        import hookmap
        from hookmap.analysis.dictionaries.training import train_dictionary

        made = train_dictionary(None, hookmap.open_store(capture), point, layer, **chosen)
    else:
        batches = typed_or_set(given, settings, "batch_size", "batch_tokens")
        made = opened(model, given).train_dictionary(prompts, point, layer, **chosen, **batches, **how)
    screen.print(repr(made.dictionary), markup=False)
    click.echo(output)


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
        "skip": about.skip,
    }
