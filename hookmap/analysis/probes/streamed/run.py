"""`HookedModel.train_probe`, and the same on a stored capture."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hookmap.activations import Key, Sample
from hookmap.analysis.gathering import refuse_other_rows
from hookmap.analysis.kept import Kept
from hookmap.analysis.probes.report import PROBES, REPORT
from hookmap.analysis.probes.saved import About, Probes
from hookmap.analysis.probes.streamed.learner import Learning
from hookmap.analysis.probes.streamed.progress import PROGRESS, Progress
from hookmap.analysis.probes.streamed.reading import Buffers, Reading, Takes
from hookmap.analysis.probes.streamed.report import StreamReport, save_report
from hookmap.analysis.probes.streamed.targets import (
    CHOICE,
    KINDS,
    STREAM_POOLS,
    TEST,
    TRAIN,
    Part,
    Targets,
    read_targets,
)
from hookmap.analysis.probes.streamed.trial import Trial
from hookmap.analysis.reductions.run import held
from hookmap.capture.options import Layers, Points
from hookmap.capture.prepare import Prepared, say_apart
from hookmap.capture.rows import without_features
from hookmap.errors import SelectionError, StoreError
from hookmap.loading.generation import check_count
from hookmap.stores.durable_files import writing
from hookmap.stores.interface import Store
from hookmap.stores.ledger import tensor_name
from hookmap.stores.location import local
from hookmap.stores.manifest import versions
from hookmap.stores.number_set import NumberSet

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

_ROWS, _TEXTS = 4096, 64
"""of a store that are read together"""
Pass = Callable[[Sequence[Part], int, Takes, Set[int]], None]
"""reads the texts of some parts once, but those that were read, in the order of the pass with this number"""


@dataclass(frozen=True)
class StreamedProbes:
    """The result of `train_probe`."""

    report: StreamReport
    probes: Probes
    """one for each tensor, of all of `train`: `probes.logits(rows, point, layer)` are [n, classes], or the numbers"""

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write report.json and probes.safetensors. Raises StoreError."""
        target = Path(folder)
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
        probes = self.probes.save(target / PROBES)
        return [save_report(self.report, target), probes]  # the report last: where it is, both are


def train_probe(
    hm: Hooked | None,
    texts: Any,
    label: str = "label",
    points: Points = "resid_post",
    layers: Layers = "all",
    *,
    kind: Any = "classes",
    labels: Any = None,
    group: str | None = None,
    pool: str = "last",
    skip: int = 1,
    shuffles: int = 3,
    passes: int = 1,
    batch_rows: int = 256,
    learning_rate: float = 3e-3,
    decay: float = 1e-3,
    buffer_rows: int = 4096,
    training_seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **options: Any,
) -> StreamedProbes:
    """See `HookedModel.train_probe`; `hm` may be None where texts is a store."""
    begun = time.perf_counter()
    if store is not None and (local(store) / REPORT).exists():
        raise StoreError(f"{store} already holds a report of probes. Write to another folder: -o DIR")
    _check(kind, pool, learning_rate, decay)
    for name, value, least in (
        ("skip", skip, 0), ("shuffles", shuffles, 1), ("passes", passes, 1), ("batch_rows", batch_rows, 1),
        ("buffer_rows", buffer_rows, 1),
    ):  # fmt: skip
        check_count(name, value, least=least)
    asked = {"kind": kind, "group": group, "pool": pool, "skip": skip, "shuffles": shuffles, "seed": training_seed}
    if isinstance(texts, Store) or isinstance(getattr(texts, "store", None), Store):
        if options:
            raise SelectionError(f"{', '.join(options)}: a store has its rows already: leave these out.")
        rows = texts if isinstance(texts, Store) else texts.store
        keys, samples, source = held(rows, points, layers), rows.samples, str(getattr(rows, "path", "memory"))
        manifest = getattr(rows, "manifest", None)
        model, run = getattr(manifest, "model", None), getattr(manifest, "settings", {})
        targets, read = _of_store(rows, keys, samples, buffer_rows, training_seed, label, labels, asked)
    elif hm is None:
        raise SelectionError("texts need a model that reads them: hookmap.open(MODEL).train_probe(texts, …)")
    else:
        refuse_other_rows(options, "a probe chooses its rows by its label and pool=", "max_new_tokens")
        prepared = hm.prepare(texts, points, layers, max_new_tokens=0, **options)
        keys, targets, read = _of_model(prepared, buffer_rows, training_seed, label, labels, asked)
        model, run, source = hm.name, prepared.manifest.settings, "texts"
    learning = Learning(
        len(targets.classes), 1 + shuffles, max(1, targets.rows(TRAIN) * passes), batch_rows, learning_rate, decay,
        training_seed,
    )  # fmt: skip
    trial = Trial(learning, targets)
    settings: dict[str, Any] = {"passes": passes, "batch_rows": batch_rows, "learning_rate": learning_rate}
    settings |= {"decay": decay, "skip": skip, "seed": training_seed, "shuffles": shuffles}
    same = {"model": model, "tensors": [tensor_name(key) for key in keys], "label": label, "kind": kind, "pool": pool}
    same |= {**settings, "buffer_rows": buffer_rows, "labels": targets.digest, "settings": run, "versions": versions()}
    kept = Kept(Progress(same, trial), PROGRESS, store, resume)
    progress = kept.result
    if progress.trial is None:
        progress.go_on(trial, keys)

    def done(numbers: list[int]) -> None:
        progress.samples.update(numbers)
        kept.now_and_then()

    while progress.passes <= passes:
        number = progress.passes
        learns = number < passes
        trial.counting = not number or not learns
        takes = Takes(trial.learn if learns else trial.score, done)
        read((TRAIN,) if learns else (CHOICE, TEST), number if learns else 0, takes, progress.samples.copy())
        progress.passes, progress.samples = number + 1, NumberSet()
    report = trial.report(keys, model=model, source=source, label=label, begun=begun, **settings)
    about = About(
        label=label,
        method="streamed",
        pool=pool if targets.per == "text" else "token",
        model=model,
        samples=max(1, len(targets.numbers(TRAIN))),
        kind=kind,
        classes=targets.classes,
    )
    found = StreamedProbes(report, trial.probes(keys, about))
    if store is not None:
        found.save(store)
        (local(store) / PROGRESS.file).unlink(missing_ok=True)  # what it was needed for is done
    return found


def _check(kind: Any, pool: Any, rate: Any, decay: Any) -> None:
    """Raises SelectionError with all that is wrong."""
    wrong = []
    if kind not in KINDS:
        wrong.append(f"kind: expected {' or '.join(KINDS)}, got {kind!r}")
    if pool not in STREAM_POOLS:
        wrong.append(f"pool: expected one of {', '.join(STREAM_POOLS)}, got {pool!r}")
    if not isinstance(rate, int | float) or not 0 < rate < 1:
        wrong.append(f"learning_rate: expected a number between 0 and 1, got {rate!r}")
    if not isinstance(decay, int | float) or not 0 <= decay < float("inf"):
        wrong.append(f"decay: expected a number from 0 on, got {decay!r}")
    if wrong:
        raise SelectionError("no probe: " + "; ".join(wrong) + ".")


def _refuse(keys: Sequence[Key]) -> None:
    """Raises SelectionError for tensors whose rows are no vectors of one width."""
    if not keys:
        raise SelectionError("no tensor to probe: name points and layers.")
    if wrong := without_features(key[0] for key in keys):
        raise SelectionError(f"{', '.join(wrong)}: its rows are no vectors of one width, which a probe needs.")


def _of_model(
    prepared: Prepared, size: int, seed: int, label: str, labels: Any, asked: Mapping[str, Any]
) -> tuple[tuple[Key, ...], Targets, Pass]:
    keys, run = prepared.manifest.keys, prepared.run
    _refuse(keys)
    samples = [run.expected(number) for number in range(len(run.prompts))]
    targets = read_targets(samples, label, labels, **asked)
    say_apart(prepared.apart)
    tokens = _tokens(samples, targets)

    def read(parts: Sequence[Part], number: int, takes: Takes, finished: Set[int]) -> None:
        wanted = {*targets.numbers(*parts)}
        groups = [own for group in prepared.groups if (own := tuple(n for n in group if n in wanted))]
        random.Random(f"{seed} {number}").shuffle(groups)
        buffers = Buffers(targets, tokens, takes, size)
        replace(prepared, groups=tuple(groups)).into(Reading(keys, targets, buffers, samples.__getitem__), finished)
        buffers.flush()

    return keys, targets, read


def _of_store(
    store: Store,
    keys: tuple[Key, ...],
    samples: Sequence[Sample],
    size: int,
    seed: int,
    label: str,
    labels: Any,
    asked: Mapping[str, Any],
) -> tuple[Targets, Pass]:
    _refuse(keys)
    targets = read_targets(samples, label, labels, **asked)
    tokens = _tokens(samples, targets)

    def read(parts: Sequence[Part], number: int, takes: Takes, finished: Set[int]) -> None:
        numbers = [*targets.numbers(*parts)]
        random.Random(f"{seed} {number}").shuffle(numbers)
        buffers = Buffers(targets, tokens, takes, size)
        for batch in _batches([each for each in numbers if each not in finished], targets):
            for key in keys:
                parts_of = [store.rows_at(n, key, targets.of[n].rows.tolist()) for n in batch]
                rows = torch.cat([each if each.is_sparse else each.flatten(1) for each in parts_of])
                buffers.add(key, buffers.pooled(rows, batch), batch)
            buffers.end({n: store.sample(n) for n in batch})
        buffers.flush()

    return targets, read


def _tokens(samples: Sequence[Sample], targets: Targets) -> int:
    """How many ids of tokens there may be."""
    return 1 + max(max(samples[number].token_ids, default=0) for number in targets.of)


def _batches(numbers: list[int], targets: Targets) -> Iterator[list[int]]:
    batch: list[int] = []
    rows = 0
    for number in numbers:
        batch.append(number)
        rows += len(targets.of[number].rows)
        if rows >= _ROWS or len(batch) >= _TEXTS:
            yield batch
            batch, rows = [], 0
    if batch:
        yield batch
