"""`hookmap capture`: generate, and keep the chosen tensors in a folder."""

from collections.abc import Sequence
from contextlib import ExitStack
from numbers import Integral
from pathlib import Path
from typing import Any

import click

from hookmap.cli.chat_options import chat_options, of_default_prompt, tell, templating
from hookmap.cli.cluster_options import cluster_of, clustered, opened_elsewhere, taps_of
from hookmap.cli.model_options import loading, opened
from hookmap.cli.one_prompt import DEFAULT_PROMPT
from hookmap.cli.options import calls_option, count, option_group
from hookmap.cli.prompts_file import chosen_prompts, prompt_options
from hookmap.cli.row_options import dtype_options, kept_dtype, row_options, row_selection
from hookmap.cli.sampling_options import sampling, sampling_options

_TENSORS = option_group(
    click.option("--points", metavar="NAMES", help="Which tensors: resid_pre,resid_mid or resid_post@3,5,z@8 or all."),
    click.option("--layers", metavar="LAYERS", help="Which layers: 8,12,16 or 0-3 or -1 or all.  [default: all]"),
    calls_option,
)
_DICTIONARIES = click.option(
    "--dictionary",
    "dictionaries",
    multiple=True,
    metavar="DIR",
    help="Also keep the features of this sparse autoencoder, a folder or a hub id; --points features: those alone.",
)
_FOLDER = option_group(
    click.option("-o", "--output", metavar="DIR", help="The capture folder.  [default: a new one in captures/]"),
    click.option("--resume", is_flag=True, help="Continue the capture in DIR."),
)
_BATCHES = option_group(
    count(
        "--max-new-tokens",
        least=0,
        help="Tokens to generate for each prompt; 0 reads the given texts only (a harvest).  [default: 64]",
    ),
    count("--batch-size", "How many prompts run together.  [default: 8]"),
    count("--batch-tokens", "How many tokens a harvest runs at once.  [default: 4096]"),
)
_ENGINE = option_group(
    click.option(
        "--engine",
        type=click.Choice(["auto", "hooks", "nnsight", "ray", "remote", "vllm"]),
        help="What watches the model; ray: many processes that each hold it; remote: nnsight's server; vllm: "
        "a serving engine that runs it, with --workers in each of Ray's.  "
        "[default: auto]",
    ),
    clustered,
)
_INTERVENTIONS = option_group(
    click.option("--intervene", metavar="FILE", help="Apply the interventions in this JSON or YAML file."),
    click.option(
        "--before", is_flag=True, help="With --intervene: also store the rows before the interventions, in DIR/before."
    ),
)


@click.command()
@click.argument("model", required=False)
@_TENSORS
@prompt_options
@_FOLDER
@_BATCHES
@_DICTIONARIES
@row_options
@dtype_options
@_ENGINE
@_INTERVENTIONS
@sampling_options
@chat_options
@loading
def command(model: str | None, output: str | None, resume: bool, **given: Any) -> None:
    """Generate with MODEL and keep tensors.

    Keeps the chosen points of the prompt and of every generated token. With --max-new-tokens 0 the texts are only
    read, in one forward pass that ends at the last layer needed.

    \b
    hookmap capture --points resid_pre,resid_mid --layers 8,12,16
    hookmap capture Qwen/Qwen3-0.6B --points resid_post --prompts questions.jsonl --max-new-tokens 256 -o run
    hookmap capture --points resid_post --layers 12 --prompts texts.jsonl --max-new-tokens 0 --every 4

    The folder's name goes to stdout. Read it with `hookmap inspect DIR`, or in Python with hookmap.open_store(DIR).
    """
    from hookmap.cli.capture_run import announce, run_capture
    from hookmap.cli.settings import (
        choose_model,
        chosen_calls,
        chosen_tensors,
        load_settings,
        refuse_unknown,
        typed_or_set,
    )

    settings = load_settings()
    how = templating(given, settings)
    points, layers = chosen_tensors(settings, given.pop("points"), given.pop("layers"))
    calls = chosen_calls(settings, given.pop("calls"))
    if not points:
        raise click.UsageError("which points? For example: --points resid_pre,resid_mid. All of them: hookmap show")
    own = chosen_prompts(given, settings, how.get("chat"))
    prompts = [_default_prompt()] if own is None else own
    engine = typed_or_set(given, settings, "engine").get("engine", "auto")
    cluster = cluster_of(engine, given, settings)
    written = _interventions(given.pop("intervene"), given.pop("before"))
    written |= _dictionaries(given.pop("dictionaries"))
    batches = {"max_new_tokens": 64} | typed_or_set(given, settings, "max_new_tokens", "batch_size", "batch_tokens")
    drawn = sampling(given, settings, generates=batches["max_new_tokens"] > 0)
    rows = row_selection(given, settings)
    kept = rows | kept_dtype(given, settings)
    folder = _folder(output, resume)
    _check_folder(folder, resume)
    if cluster is not None and engine == "vllm":
        cluster |= taps_of(points, layers, written.get("interventions", ()), written.get("dictionaries", ()))
    model = choose_model(model, settings)
    from hookmap.capture.features import without_features

    asked: Any = without_features(points) or "all" if written.get("dictionaries") else points
    refuse_unknown(asked, layers, model, calls, **rows)

    with ExitStack() as stack:
        if cluster is None:
            hm: Any = opened(model, given, texts=any(map(_is_text, prompts)))
        else:
            hm = opened_elsewhere(model, given, engine, cluster, stack)
        run = {"points": points, "layers": layers, "calls": calls, **batches, **kept, **written}
        run |= of_default_prompt(hm.tokenizer, how) if own is None else how
        if cluster is None:
            run["engine"] = engine
        if batches["max_new_tokens"] and own is not None:
            tell(hm.tokenizer, how, any(map(_is_plain, own)))
        announce(hm, prompts, run, folder)
        run_capture(hm, prompts, run, drawn, folder, resume)
    click.echo(str(folder))


def _default_prompt() -> str:
    """stderr says that it is asked."""
    click.echo(f"prompt: {DEFAULT_PROMPT} (the default; give your own with --prompt or --prompts)", err=True)
    return DEFAULT_PROMPT


def _is_plain(prompt: Any) -> bool:
    """Whether it is a text, as it is or in a record."""
    return isinstance(getattr(prompt, "prompt", prompt), str)


def _is_text(prompt: Any) -> bool:
    """Whether it needs a tokenizer: a text or messages, as it is or in a record; a list of token ids does not."""
    return not all(isinstance(part, Integral) for part in getattr(prompt, "prompt", prompt))


def _interventions(file: str | None, before: bool) -> dict[str, Any]:
    """What is written while the model runs. Read before the weights are loaded: a wrong file is refused at once."""
    if file is None:
        if before:
            raise click.UsageError("--before keeps rows from before interventions: name them with --intervene FILE")
        return {}
    from hookmap.capture.interventions.documents import load_interventions

    return {"interventions": load_interventions(file), "before": before}


def _dictionaries(sources: Sequence[str]) -> dict[str, Any]:
    """Read before the weights of the model are loaded, as interventions are."""
    if not sources:
        return {}
    from hookmap.analysis.dictionaries.loading import load_dictionary

    return {"dictionaries": tuple(map(load_dictionary, sources))}


def _folder(output: str | None, resume: bool) -> Path:
    """Where to write. A new name under captures/ unless one is given."""
    if resume and not output:
        raise click.UsageError("--resume needs the folder to go on with: -o DIR")
    if output:
        return Path(output)
    number = 1
    while (folder := Path("captures") / f"{number:04d}").exists():
        number += 1
    return folder


def _check_folder(folder: Path, resume: bool) -> None:
    """Before the weights are loaded, which may take minutes."""
    from hookmap.stores.manifest import read_manifest
    from hookmap.stores.write_access import refuse_used

    if resume:
        read_manifest(folder)
    else:
        refuse_used(folder)
