"""`HookedModel.reduce`, and the same over a stored capture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any

from hookmap.activations import Activation, Key, Sample, Sink, call_of
from hookmap.analysis.kept import Kept
from hookmap.analysis.reductions.files import STATISTICS
from hookmap.analysis.reductions.reducer import Reducer
from hookmap.analysis.reductions.statistics import Statistics
from hookmap.analysis.reductions.wanted import DEFAULT, LABEL, POSITION, SINK, TOKEN, Wanted, wanted
from hookmap.capture.options import Layers, Points
from hookmap.capture.prepare import Prepared, say_apart
from hookmap.capture.rows import NUMBERS
from hookmap.errors import SelectionError
from hookmap.maps.points import FEATURES, PointName
from hookmap.stores.interface import Store
from hookmap.stores.manifest import versions
from hookmap.stores.number_set import NumberSet

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

_PIECE = 4096
"""rows of a store that are summed up at a time"""


def reduce(
    hm: Hooked,
    prompts: Any,
    points: Points = "resid_post",
    layers: Layers = "all",
    reductions: str | Iterable[str] = DEFAULT,
    max_new_tokens: int = 0,
    *,
    by: str | Iterable[str] | None = None,
    edges: Iterable[float] | None = None,
    direction: Any = None,
    store: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **options: Any,
) -> Statistics:
    """See `HookedModel.reduce`."""
    chosen = wanted(reductions, groupings(by, options), edges, direction)
    prepared = hm.prepare(prompts, points, layers, max_new_tokens, **options)
    say_apart(prepared.apart)
    kept = Kept(begun(prepared, chosen), STATISTICS, store, resume)
    into(prepared, kept.result, kept.now_and_then)
    return kept.end(len(prepared.run.prompts))


def groupings(by: str | Iterable[str] | None, options: Mapping[str, Any]) -> str | Iterable[str]:
    """The groups that are asked for; unless given, sinks apart, where rows have positions. Raises SelectionError.

    options: of the capture.
    """
    if options.get("before"):
        raise SelectionError("before=True stores rows, and statistics store none: reduce once without interventions.")
    if not options.get("mean"):
        return (SINK,) if by is None else by
    named = () if by is None else (by,) if isinstance(by, str) else tuple(by)
    if wrong := [name for name in named if name in (SINK, POSITION, TOKEN)]:
        raise SelectionError(f"by {', '.join(wrong)}: mean=True makes one row of all tokens, which has no position.")
    return named


def begun(prepared: Prepared, chosen: Wanted) -> Statistics:
    """Statistics of a run that has not begun. Raises SelectionError for what cannot be reduced."""
    keys = prepared.manifest.keys
    refuse(keys, chosen, (p.labels for p in prepared.run.prompts))
    if wide := dict.fromkeys(s.point for s in prepared.run.selectors if s.has_keys):
        raise SelectionError(
            f"{', '.join(wide)}: its rows are as wide as their text, so that there is nothing to average. Leave it out."
        )
    manifest = prepared.manifest
    about = {"model": manifest.model, "architecture": manifest.architecture, "settings": manifest.settings}
    return Statistics(chosen, keys, {**about, "versions": versions()})


def refuse(keys: Iterable[Key], chosen: Wanted, labels: Iterable[Mapping[str, Any] | None]) -> None:
    """Raises SelectionError for points without numbers to sum up, and labels that no sample has."""
    if numbers := dict.fromkeys(key[0] for key in keys if PointName.of(key[0]).base in NUMBERS):
        raise SelectionError(
            f"{', '.join(numbers)}: numbers of experts have no mean. Take router_logits, or leave it out."
        )
    features = any(PointName.of(key[0]).base == FEATURES for key in keys)
    if features and (meant := [name for name in ("outlier", "massive", "covariance") if name in chosen.reductions]):
        raise SelectionError(
            f"{', '.join(meant)}: cannot be computed of a dictionary's features. Choose other reductions, such as mean."
        )
    names = [by.removeprefix(LABEL) for by in chosen.by if by.startswith(LABEL)]
    if names:
        held = {name: value for each in labels for name, value in (each or {}).items()}
        if missing := [name for name in names if name not in held]:
            there = ", ".join(held) or "none: keep columns of the data set as labels (--label NAME)"
            raise SelectionError(f"by label {', '.join(missing)}: no sample has it. Labels there are: {there}.")
        if nested := [name for name in names if isinstance(held[name], list | dict)]:
            raise SelectionError(f"by label {', '.join(nested)}: its values are lists or objects, not one value each.")


def into(
    prepared: Prepared,
    statistics: Statistics,
    after: Callable[[], None] = lambda: None,
    finished: Set[int] = frozenset(),
) -> None:
    """Run every batch with a sample that is neither in the statistics nor `finished`, and sum up its rows.

    after: called behind each batch.
    """
    run, there = prepared.run, statistics.samples.copy()
    there.update(finished)
    known = None
    if not run.max_new_tokens:
        known = {n: run.expected(n) for n in range(len(run.prompts)) if n not in there}.__getitem__
    prepared.into(Reducer(statistics, known, after, _most(prepared, statistics)), there)


def _most(prepared: Prepared, statistics: Statistics) -> dict[str, int]:
    """How many groups of each grouping may come."""
    run = prepared.run
    found: dict[str, int] = {}
    for by in statistics.wanted.by:
        if by == POSITION:
            found[by] = max(len(prompt.token_ids) for prompt in run.prompts) + max(0, run.max_new_tokens - 1)
        elif by == TOKEN:
            new = len(run.prompts) * max(0, run.max_new_tokens - 1)
            found[by] = len({token for prompt in run.prompts for token in prompt.token_ids}) + new
        elif by.startswith(LABEL):
            name = by.removeprefix(LABEL)
            found[by] = len({repr((prompt.labels or {}).get(name)) for prompt in run.prompts})
    return found


def reduce_store(
    source: Store,
    points: Points = "all",
    layers: Layers = "all",
    reductions: str | Iterable[str] = DEFAULT,
    *,
    by: str | Iterable[str] | None = None,
    edges: Iterable[float] | None = None,
    direction: Any = None,
) -> Statistics:
    """Statistics of a stored capture: the same numbers as those of the run that wrote it, in the stored dtype.

    points, layers: of those that it holds. Raises SelectionError, and StoreError where a shard cannot be read.
    """
    means = any(sample.positions == "mean" for sample in source.samples)
    chosen = wanted(reductions, groupings(by, {"mean": means}), edges, direction)
    keys = held(source, points, layers)
    refuse(keys, chosen, (sample.labels for sample in source.samples))
    if not len(source):
        raise SelectionError("this capture has no finished samples: there is nothing to sum up.")
    statistics = Statistics(chosen, keys, {"model": None, "versions": versions()})
    replay(source, keys, Reducer(statistics, source.sample))
    statistics.complete = True
    return statistics


def held(source: Store, points: Points, layers: Layers) -> tuple[Key, ...]:
    """The keys of a store that these name, in forward order. Raises SelectionError."""
    if isinstance(points, Mapping):
        named = dict(points)
    else:
        names = source.points if points == "all" else (points,) if isinstance(points, str) else tuple(points)
        named = dict.fromkeys(names, layers)
    found: set[Key] = set()
    for name, own in named.items():
        each = [None] if own == "all" else [own] if isinstance(own, int) else list(own)
        for layer in each:
            found.update(source.keys_of(name, layer))
    return tuple(key for key in source.keys if key in found)


def replay(source: Store, keys: tuple[Key, ...], sink: Sink) -> None:
    """Hand a sink the rows of a store, some thousand at a time, as a run would. Raises StoreError."""
    for batch in _batches(source):
        for key in keys:
            for sample in batch:
                rows = source.rows_at(sample.sample, key, range(sample.rows))
                sink.write(Activation(sample.sample, key[0], key[1], 0, rows, call_of(key)))
        for sample in batch:
            sink.finish(sample)


def _batches(source: Store) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in source.samples:
        batch.append(sample)
        if sum(each.rows for each in batch) >= _PIECE:
            yield batch
            batch = []
    if batch:
        yield batch


def merged(parts: Iterable[Statistics]) -> Statistics:
    """One statistics of several: parts of one run, or runs of one model over different texts. Raises SelectionError."""
    runs: list[tuple[list[dict[str, Any]], Statistics]] = []
    for part in parts:
        settings = part.about.get("runs") or [part.about.get("settings", {})]
        own = next((found for of, found in runs if of == settings), None)
        if own is None:
            own = Statistics(part.wanted, part.keys, part.about)
            runs.append((settings, own))
        own.absorb(part)
        own.complete = own.complete or part.complete
    if not runs:
        raise SelectionError("nothing to merge: expected two or more parts, got none.")
    if len(runs) == 1:
        return runs[0][1]
    every = [settings for of, _ in runs for settings in of]
    _refuse_strangers(every, [found for _, found in runs])
    whole = Statistics(runs[0][1].wanted, runs[0][1].keys, {**runs[0][1].about, "settings": {}, "runs": every})
    for _, found in runs:
        first = len(whole.samples)
        found.samples = NumberSet(range(first, first + len(found.samples)))  # each run counts its own from 0 on
        whole.absorb(found)
    whole.complete = all(found.complete for _, found in runs)
    return whole


def _refuse_strangers(settings: list[dict[str, Any]], runs: list[Statistics]) -> None:
    """Raises SelectionError for runs of different models, or of the same texts."""
    if any(run.about.get("architecture") != runs[0].about.get("architecture") for run in runs) or any(
        of.get("weights") != settings[0].get("weights") for of in settings
    ):
        names = ", ".join(str(run.about.get("model")) for run in runs)
        raise SelectionError(f"these statistics are of different models ({names}): they do not merge.")
    texts = [of.get("prompts_sha256") for of in settings]
    if len(set(texts)) < len(texts):
        raise SelectionError(
            "some of these statistics are of the same texts, run with other settings: they would count twice."
        )
