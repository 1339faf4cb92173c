"""`hookmap capture`: generate, and keep the chosen tensors in a folder."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli.chat_options import chat_options, of_default_prompt, tell, templating
from hookmap.cli.cluster_options import cluster_of, clustered, opened_elsewhere
from hookmap.cli.finite import FiniteRange
from hookmap.cli.model_options import loading, opened
from hookmap.cli.one_prompt import DEFAULT_PROMPT
from hookmap.cli.prompts_file import prompt_options, read_prompts
from hookmap.wording import counted

if TYPE_CHECKING:
    from hookmap.capture.options import Progress
    from hookmap.model import HookedModel
    from hookmap.services.ray.model import RayModel

    Model = HookedModel | RayModel

_LARGE_BYTES = 10**9
_LARGE_PASSES = 1000
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@click.command()
@click.argument("model", required=False)
@click.option("--points", metavar="NAMES", help="Which tensors: resid_pre,resid_mid or resid_post@3,5,z@8 or all.")
@click.option("--layers", metavar="LAYERS", help="Of which layers: 8,12,16 or 0-3 or -1 or all.  [default: all]")
@prompt_options
@click.option("-o", "--output", metavar="DIR", help="The capture folder.  [default: a new one in captures/]")
@click.option("--resume", is_flag=True, help="Go on with the capture that is in DIR.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=0),
    metavar="N",
    help="For each prompt; 0 only reads the given texts (a harvest).  [default: 64]",
)
@click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Prompts that run together.  [default: 8]")
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens a harvest runs at once.  [default: 4096]",
)
@click.option(
    "--positions",
    metavar="WHERE",
    help="Rows of which tokens: all, prompt, generated, last, last_prompt, a span 4:20 or -5:, positions 0,3,-1, or "
    "text=… for tokens whose text contains it.  [default: all]",
)
@click.option("--every", type=click.IntRange(min=1), metavar="N", help="Only positions that N divides.")
@click.option("--mean/--no-mean", default=None, help="One row a sample: the mean over its positions.")
@click.option("--features", metavar="N|LIST", help="Draw N features of each row, or keep those listed: 3,17,99 or 3,")
@click.option("--features-seed", type=int, metavar="N", help="Draws other features.  [default: 0]")
@click.option("--keep-dtype", type=click.Choice(_DTYPES[1:]), help="Of the rows kept.  [default: the model's own]")
@click.option(
    "--overflow", type=click.Choice(["warn", "refuse"]), help="What is infinite in --keep-dtype only.  [default: warn]"
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "hooks", "nnsight", "ray", "remote"]),
    help="What watches the model; ray: many processes that each hold it; remote: nnsight's server.  [default: auto]",
)
@clustered
@click.option("--intervene", metavar="FILE", help="Write while it runs: a JSON or YAML file of interventions.")
@click.option("--before", is_flag=True, help="With --intervene: the rows right before it too, in DIR/before.")
@click.option(
    "--temperature",
    type=FiniteRange(min=0),
    metavar="T",
    help="Sample at this temperature; greedy if not given, or 0.",
)
@click.option(
    "--top-p",
    type=FiniteRange(0, 1, min_open=True),
    metavar="P",
    help="Sample from the likeliest tokens of this mass.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    metavar="K",
    help="Sample from this many likeliest tokens; 0: all.  [default: the model's own, else 50]",
)
@click.option("--seed", type=int, metavar="N", help="Makes sampling repeatable.")
@chat_options
@loading
def command(
    model: str | None,
    points: str | None,
    layers: str | None,
    texts: tuple[str, ...],
    prompts: str | None,
    prompt_column: str | None,
    id_column: str | None,
    labels: tuple[str, ...],
    skip: int,
    limit: int | None,
    output: str | None,
    resume: bool,
    max_new_tokens: int | None,
    batch_size: int | None,
    batch_tokens: int | None,
    positions: str | None,
    every: int | None,
    mean: bool | None,
    features: str | None,
    features_seed: int | None,
    keep_dtype: str | None,
    overflow: str | None,
    engine: str | None,
    intervene: str | None,
    before: bool,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    **loads: Any,
) -> None:
    """Generate with MODEL and keep tensors.

    Keeps the chosen points of the prompt and of every generated token. With --max-new-tokens 0 the texts are only
    read, in one forward pass that ends at the last layer needed.

    \b
    hookmap capture --points resid_pre,resid_mid --layers 8,12,16
    hookmap capture Qwen/Qwen3-0.6B --points resid_post --prompts questions.jsonl --max-new-tokens 256 -o run
    hookmap capture --points resid_post --layers 12 --prompts texts.jsonl --max-new-tokens 0 --every 4

    The folder's name goes to stdout. Read it with `hookmap inspect DIR`, or in Python with hookmap.open_store(DIR).
    """
    from hookmap.cli.settings import choose_model, chosen_tensors, filled, load_settings, refuse_unknown

    settings = load_settings()
    how = templating(loads, settings)
    names, chosen_layers = chosen_tensors(settings, points, layers)
    if not names:
        raise click.UsageError("which points? For example: --points resid_pre,resid_mid. All of them: hookmap show")
    if texts and prompts:
        raise click.UsageError("--prompt or --prompts, not both: which of them is meant?")
    file = None if texts else prompts or settings.get("prompts")
    given = list(texts)
    if file:
        columns = filled(settings, prompt_column=prompt_column, id_column=id_column)
        given = read_prompts(file, **columns, labels=labels, skip=skip, limit=limit)
    elif not texts:
        click.echo(f"prompt: {DEFAULT_PROMPT} (the default; give your own with --prompt or --prompts)", err=True)
        given = [DEFAULT_PROMPT]
    engine = engine or settings.get("engine", "auto")
    cluster = cluster_of(engine, loads, settings)
    if before and intervene is None:
        raise click.UsageError("--before keeps rows from before interventions: name them with --intervene FILE")
    interventions = _interventions(intervene)
    tokens = settings.get("max_new_tokens", 64) if max_new_tokens is None else max_new_tokens
    drawn: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    if tokens:
        drawn = filled(settings, **drawn)
        if temperature == 0:  # typed, and stronger than how the settings would draw
            drawn |= {"top_p": top_p, "top_k": top_k}
    sampling = _sampling(**drawn)
    if not tokens and (sampling["do_sample"] or seed is not None):
        raise click.UsageError(
            "--max-new-tokens 0 generates nothing: leave --temperature, --top-p, --top-k and --seed out"
        )
    rows = {
        "positions": positions or settings.get("positions", "all"),
        "every": every or settings.get("every", 1),
        "mean": settings.get("mean", False) if mean is None else mean,
        "features": _features(features or settings.get("features")),
        "features_seed": settings.get("features_seed", 0) if features_seed is None else features_seed,
    }
    folder = _folder(output, resume)
    _check_folder(folder, resume)
    model = choose_model(model, settings)
    refuse_unknown(names, chosen_layers, model, **rows)

    with ExitStack() as stack:
        hm: Model
        if cluster is None:
            hm = opened(model, loads, texts=any(_is_text(prompt) for prompt in given))
        else:
            hm = opened_elsewhere(model, loads, engine, cluster, stack)
        run = {
            "points": names,
            "layers": chosen_layers,
            "max_new_tokens": tokens,
            **(how if file or texts else of_default_prompt(hm.tokenizer, how)),
            "batch_size": batch_size or settings.get("batch_size"),
            **rows,
            "keep_dtype": keep_dtype or settings.get("keep_dtype"),
            "overflow": overflow or settings.get("overflow", "warn"),
            "interventions": interventions,
            "before": before,
        }
        if cluster is None:
            run["engine"] = engine
        if batch_tokens := batch_tokens or settings.get("batch_tokens"):
            run["batch_tokens"] = batch_tokens
        if tokens and (file or texts):
            tell(hm.tokenizer, how, any(_is_plain(prompt) for prompt in given))
        _announce(hm, given, run, folder)
        _capture(hm, given, run, sampling, folder, resume)
    click.echo(str(folder))


def _is_plain(prompt: Any) -> bool:
    """Whether it is a text, as it is or in a record."""
    return isinstance(getattr(prompt, "prompt", prompt), str)


def _is_text(prompt: Any) -> bool:
    """Whether it needs a tokenizer: a text or messages, as it is or in a record; a list of token ids does not."""
    return not all(isinstance(part, Integral) for part in getattr(prompt, "prompt", prompt))


def _interventions(file: str | None) -> tuple[Any, ...]:
    """Before the weights are loaded: a wrong file is said at once."""
    if file is None:
        return ()
    from hookmap.capture.interventions.documents import load_interventions

    return load_interventions(file)


def _sampling(temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None) -> dict[str, Any]:
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in given.items() if value is not None}
    if temperature == 0:  # greedy, as every server understands it
        if len(given) > 1:
            raise click.UsageError("--temperature 0 is greedy: leave --top-p and --top-k out")
        given = {}
    return {"do_sample": bool(given), "seed": seed, **given}


def _features(text: str | None) -> int | list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.removesuffix(",").split(",")] if "," in text else int(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: write how many, or a list: 3,17,99", param_hint="--features") from error


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
    from hookmap.stores.access import refuse_used
    from hookmap.stores.manifest import read_manifest

    if resume:
        read_manifest(folder)
    else:
        refuse_used(folder)


def _announce(hm: "Model", prompts: list[Any], run: dict[str, Any], folder: Path) -> None:
    """How large the capture gets, and how long a large one takes, before it begins."""
    from hookmap.cli.console import console

    expected = hm.estimate(prompts, **_estimated(run))
    text = f"capture: {expected} -> {folder}"
    if expected.bytes > _LARGE_BYTES or expected.forward_passes > _LARGE_PASSES:
        text += f", at most about {_duration(_seconds_per_pass(hm, prompts, run) * expected.forward_passes)}"
    engine, why = hm.engine(run.get("engine", "auto"))
    console().print(f"{text}\nengine: {engine} ({why})", markup=False)


def _estimated(run: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `capture` that `estimate` takes too."""
    from hookmap.capture.options import EstimateOptions, of_kind

    return {name: run[name] for name in ("points", "layers", "max_new_tokens")} | of_kind(EstimateOptions, run)


def _seconds_per_pass(hm: "Model", prompts: list[Any], run: dict[str, Any]) -> float:
    """Measured on as many prompts as run together, for two tokens; a row each is kept, in memory.

    The first of the two runs warms up.
    """
    from time import perf_counter

    trial = {**run, "max_new_tokens": min(2, int(run["max_new_tokens"])), "positions": [0], "every": 1, "mean": False}
    plain = _estimated(trial)
    together = run["batch_size"] or 8
    if not trial["max_new_tokens"]:
        together = -(-len(prompts) // hm.estimate(prompts, **plain).forward_passes)
    part = prompts[:together]
    for _ in range(2):
        start = perf_counter()
        hm.capture(part, **trial)
    return (perf_counter() - start) / hm.estimate(part, **plain).forward_passes


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _capture(
    hm: "Model",
    prompts: list[Any],
    run: dict[str, Any],
    sampling: dict[str, Any],
    folder: Path,
    resume: bool,
) -> None:
    from time import perf_counter

    from hookmap.cli.console import console, size

    there = _finished(folder) if resume else frozenset()
    start = perf_counter()
    try:
        with _bars(len(prompts)) as show:
            done = hm.capture(prompts, **run, **sampling, store=folder, resume=resume, progress=show)
    except KeyboardInterrupt:
        _say_what_is_kept(folder)
        raise
    samples = [sample for sample in done.samples if sample.sample not in there]
    fresh = sum(len(sample.token_ids) - sample.prompt_tokens for sample in samples)
    what = f"{fresh} tokens generated" if run["max_new_tokens"] else f"{sum(s.prompt_tokens for s in samples)} read"
    count = counted(len(samples), "sample")
    before = f" ({len(there)} were there already)" if there else ""
    console().print(f"[dim]{count}, {what} in {perf_counter() - start:.1f} s{before}[/]")
    note = done.manifest.runs[-1]
    for line in note["halved"]:
        console().print(f"[yellow]{line}[/]")
    memory = ", ".join(f"{name} {size(value)}" for name, value in note["memory"].items())
    console().print(f"[dim]memory: {memory}[/]")


def _finished(folder: Path) -> frozenset[int]:
    import hookmap

    return frozenset(sample.sample for sample in hookmap.open_store(folder))


@contextmanager
def _bars(samples: int) -> "Iterator[Any]":
    """Two bars: prompts, and tokens of the batch that runs."""
    from hookmap.cli.console import progress

    with progress() as bars:
        prompts_bar = bars.add_task("prompts", total=samples)
        tokens_bar = bars.add_task("tokens of this batch", total=None)

        def show(state: "Progress") -> None:
            bars.update(prompts_bar, completed=state.samples_done)
            bars.update(tokens_bar, completed=state.tokens_done, total=state.tokens, visible=state.tokens > 0)

        yield show


def _say_what_is_kept(folder: Path) -> None:
    import hookmap

    try:
        kept = len(hookmap.open_store(folder))
    except hookmap.StoreError:
        click.echo("\nnothing is kept: no sample was finished", err=True)
        return
    samples = f"{counted(kept, 'finished sample')} {'is' if kept == 1 else 'are'}"
    click.echo(f"\n{samples} kept in {folder}; to go on: the same command with --resume -o {folder}", err=True)
