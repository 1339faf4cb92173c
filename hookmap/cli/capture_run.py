"""Run a capture for a person: announce its size and time, show progress, and summarise the result, on stderr."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hookmap.wording import counted

if TYPE_CHECKING:
    from hookmap.capture.options import Progress
    from hookmap.model import HookedModel
    from hookmap.services.ray.model import RayModel

    Model = HookedModel | RayModel

LARGE_BYTES = 10**9
"""a capture above this size, or of more passes than this, is timed before it begins"""
LARGE_PASSES = 1000


def announce(hm: "Model", prompts: list[Any], run: dict[str, Any], folder: Path) -> None:
    """Say how large the capture will be and, of a large one, how long it will take."""
    from hookmap.cli.console import console

    expected = hm.estimate(prompts, **_estimated(run))
    text = f"capture: {expected} -> {folder}"
    if expected.bytes > LARGE_BYTES or expected.forward_passes > LARGE_PASSES:
        text += f", at most about {_duration(_seconds_per_pass(hm, prompts, run) * expected.forward_passes)}"
    engine, why = hm.engine(run.get("engine", "auto"))
    console().print(f"{text}\nengine: {engine} ({why})", markup=False)


def _estimated(run: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `capture` that `estimate` takes too."""
    from hookmap.capture.features import without_features
    from hookmap.capture.options import EstimateOptions, of_kind

    if run.get("dictionaries"):
        run = {**run, "points": without_features(run["points"])}
    return {name: run[name] for name in ("points", "layers", "max_new_tokens")} | of_kind(EstimateOptions, run)


def _seconds_per_pass(hm: "Model", prompts: list[Any], run: dict[str, Any]) -> float:
    """Time a capture of one batch for two tokens, which keeps one row a prompt in memory.

    The first of the two runs warms up.
    """
    from time import perf_counter

    trial = {**run, "max_new_tokens": min(2, int(run["max_new_tokens"])), "positions": [0], "every": 1, "mean": False}
    plain = _estimated(trial)
    together = run.get("batch_size") or 8
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


def run_capture(
    hm: "Model",
    prompts: list[Any],
    run: dict[str, Any],
    sampling: dict[str, Any],
    folder: Path,
    resume: bool,
) -> None:
    """Capture into the folder, with progress bars, and summarise what was written."""
    from time import perf_counter

    from hookmap.cli.console import console, size

    there = _finished(folder) if resume else frozenset()
    start = perf_counter()
    try:
        with _progress_bars(len(prompts)) as show:
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
def _progress_bars(samples: int) -> "Iterator[Any]":
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
