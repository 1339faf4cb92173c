"""Activation patching: which layer, position or head carries the difference between two prompts.

The clean prompt's tensor in one cell (a head of a layer, a token) is written into the run of the corrupted prompt, and
a metric says how far the clean answer returns. This is done for each cell and each pair of prompts, many in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Unpack

import torch

from hookmap.activations import Key
from hookmap.analysis.baselines import Baselines, baselines
from hookmap.analysis.metrics import Bound, read_logits
from hookmap.analysis.pairs import EncodedPairs, encode_pairs
from hookmap.analysis.paths import Paths, paths_to
from hookmap.analysis.sweep_cells import Cells, Job, cells_of
from hookmap.analysis.sweep_file import SweepFile
from hookmap.analysis.sweeps import Sweep, names_of
from hookmap.capture.interventions.digests import digest_of
from hookmap.capture.interventions.edits import Edit
from hookmap.capture.interventions.functions import At
from hookmap.capture.interventions.operations import Patched
from hookmap.capture.interventions.plan import EditPlan
from hookmap.capture.interventions.sources import key_in_source
from hookmap.capture.options import Progress, TemplateOptions
from hookmap.capture.result import Capture
from hookmap.datasets.pairs import Pair
from hookmap.errors import InterventionError, SelectionError
from hookmap.loading.prompts import Prompt
from hookmap.maps.describe import layers_text
from hookmap.maps.selectors import Selector

if TYPE_CHECKING:
    import os

    from hookmap.capture.hooked import Hooked

_BATCHES = 16
"""batches that are planned together"""


def sweep(
    hm: Hooked,
    clean: Any,
    corrupted: Any = None,
    target: Any = None,
    against: Any = None,
    *,
    metric: Any = None,
    point: str | Sequence[str] = "resid_pre",
    layers: Any = "all",
    over: str | Sequence[str] = "positions",
    positions: Any = "all",
    heads: Sequence[int] | None = None,
    calls: Any = "all",
    source_calls: Any = None,
    noising: bool = False,
    to: str | Sequence[str] | None = None,
    through_mlps: bool = True,
    batch_size: int = 32,
    store: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **template: Unpack[TemplateOptions],
) -> Sweep:
    """See `HookedModel.sweep`."""
    pairs = _pairs(hm, clean, corrupted, target, against, template)
    if metric is None:
        metric = "probability" if all(pair.wrong is None for pair in pairs.pairs) else "logit_difference"
    bounds = pairs.bound(metric)
    start, source = bounds if noising else bounds[::-1]
    points = [point] if isinstance(point, str) else list(point)
    selectors = hm.selectors(points, layers, calls)
    paths = None
    if to is not None:
        paths, selectors = paths_to(hm, to, selectors, through_mlps, named=layers != "all")
    _check_written(hm, selectors)
    cells = cells_of(hm, start, selectors, over, positions, heads)
    sources = [key_in_source(hm.map, selector, calls, source_calls) for selector in selectors]
    rows = hm.capture(list(source.prompts), points, layers, max_new_tokens=0, engine="hooks", batch_size=batch_size)
    found = baselines(hm, start, source, min(batch_size, cells.count))
    run = _Run(hm, start, cells, _Rows(rows, len(pairs)), batch_size, paths and paths.frozen(start.prompts, batch_size))
    told = _Told(cells.total, progress)
    if resume and store is None:
        raise SelectionError("resume=True needs the file to go on with: give store=FILE.")
    if store is not None:
        settings = _settings(rows, pairs, start, cells, metric, sources, noising, paths)
        told.file = SweepFile(store, settings, resume)
        told.values.update(told.file.found)
    try:
        for number, (selector, key) in enumerate(zip(selectors, sources, strict=True)):
            run.row(number, selector, key, told)
    finally:
        if told.file is not None:
            told.file.close()
    return _result(pairs, cells, selectors, told.values, found, start, noising, paths)


def _pairs(
    hm: Hooked, clean: Any, corrupted: Any, target: Any, against: Any, template: Mapping[str, Any]
) -> EncodedPairs:
    """The pairs that were given, or the one of two prompts. Raises InterventionError and SelectionError."""
    if corrupted is None:
        if target is not None or against is not None:
            raise SelectionError("target and against are of one clean and one corrupted prompt; pairs have their own.")
        return encode_pairs(hm, clean, template)
    prompts = [hm.encode(given, **template) for given in (clean, corrupted)]
    if wrong := [len(found) for found in prompts if len(found) != 1]:
        raise InterventionError(
            f"a sweep is over one clean and one corrupted prompt, got {wrong[0]}. Give pairs: "
            "hm.sweep([hookmap.Pair(clean, corrupted, target, against), …])."
        )
    return encode_pairs(hm, Pair(prompts[0][0], prompts[1][0], target, against), {})


@dataclass
class _Told:
    """What is done so far, and who is told of it."""

    jobs: int
    progress: Callable[[int, int], None] | None
    values: dict[int, float] = field(default_factory=dict)
    """job -> value"""
    file: SweepFile | None = None
    _new: dict[int, float] = field(default_factory=dict)

    def take(self, job: int, value: float) -> None:
        self._new[job] = value

    def batch(self, state: Progress | None = None) -> None:
        """A batch is over."""
        if not self._new:
            return
        if self.file is not None:
            self.file.add([*self._new], [*self._new.values()])
        self.values |= self._new
        self._new.clear()
        if self.progress is not None:
            self.progress(len(self.values), self.jobs)


@dataclass(frozen=True)
class _Rows:
    """The tensors of the run that patches come from, the rows of all pairs behind each other."""

    run: Capture
    pairs: int

    def of(self, key: Key) -> tuple[torch.Tensor, list[int]]:
        """[rows, ...], and where those of each pair begin."""
        parts = [self.run.read(number, *key) for number in range(self.pairs)]
        begins = [0]
        for part in parts:
            begins.append(begins[-1] + len(part))
        return torch.cat(parts), begins


@dataclass(frozen=True)
class _Run:
    hm: Hooked
    start: Bound
    """the metric of the prompts that are patched"""
    cells: Cells
    rows: _Rows
    batch_size: int
    paths: Paths | None

    def row(self, number: int, selector: Selector, key: Key, told: _Told) -> None:
        """Patch every cell of one row of the sweep, for each pair."""
        left = [job for job in self.cells.jobs(number) if job.number not in told.values]
        if not left:
            return
        values, begins = self.rows.of(key)
        step = _BATCHES * self.batch_size
        for first in range(0, len(left), step):
            part = left[first : first + step]
            maps = [{place: begins[job.pair] + place for place in job.places} for job in part]
            head_of = (lambda sample, part=part: part[sample].head) if self.cells.heads is not None else None
            own = self.cells.chosen
            taken = values if own is None else values[:, list(own)]
            patched = Patched(taken, maps.__getitem__, head_of)
            plan = EditPlan((Edit(selector, patched, heads=own, only=patched),), [])
            prompts = [self.start.prompts[job.pair] for job in part]
            if self.paths is not None:
                plan = self.paths.plan(selector, plan, prompts, [job.pair for job in part])
            self._measure(prompts, plan, part, told)

    def _measure(self, prompts: list[Prompt], plan: EditPlan, jobs: Sequence[Job], told: _Told) -> None:
        def take(logits: torch.Tensor, at: At) -> None:
            job = jobs[at.sample]
            told.take(job.number, float(self.start(logits, job.pair)))

        how = {"batch_size": self.batch_size, "batch_tokens": self.batch_size * max(len(p.token_ids) for p in prompts)}
        read_logits(self.hm, prompts, self.start.positions, take, plan, {**how, "progress": told.batch})
        told.batch()


def _check_written(hm: Hooked, selectors: Sequence[Selector]) -> None:
    """Raises InterventionError where the point must not be written in some layers, with each reason once."""
    refused: dict[str, list[int]] = {}
    for selector in selectors:
        if (reason := hm.proofs.of(selector).reason) is not None:
            refused.setdefault(reason, []).append(-1 if selector.layer is None else selector.layer)
    if refused:
        lines = [f"  - {layers_text(layers)}: {reason}" for reason, layers in refused.items()]
        raise InterventionError(f"{selectors[0].point} is not written:\n" + "\n".join(lines))


def _settings(
    rows: Capture,
    pairs: EncodedPairs,
    start: Bound,
    cells: Cells,
    metric: Any,
    keys: Sequence[Key],
    noising: bool,
    paths: Paths | None,
) -> dict[str, Any]:
    """All that decides the values of a sweep, as plain data."""
    measured = metric if isinstance(metric, str) else start.name
    code = digest_of(metric) if callable(metric) else repr(metric)
    return {
        "model": {name: rows.manifest.settings.get(name) for name in ("weights", "interventions")},
        "architecture": rows.manifest.architecture,
        "source prompts": rows.manifest.settings["prompts_sha256"],
        "prompts": [list(prompt.token_ids) for prompt in start.prompts],
        "metric": [measured, code],
        "answers": [[pair.answer, pair.wrong] for pair in pairs.pairs],
        "tensors": [list(key) for key in keys],
        "cells": [cells.heads, cells.chosen, cells.places],
        "noising": noising,
        "path": None if paths is None else paths.name,
    }


def _result(
    pairs: EncodedPairs,
    cells: Cells,
    selectors: Sequence[Selector],
    values: Mapping[int, float],
    found: Baselines,
    start: Bound,
    noising: bool,
    paths: Paths | None,
) -> Sweep:
    every = torch.full(cells.shape, float("nan")).flatten()
    every[list(values)] = torch.tensor([*values.values()], dtype=torch.float32)
    sides = (found.start, found.source)
    clean, corrupted = sides if noising else sides[::-1]
    return Sweep(
        every.reshape(cells.shape).movedim(-1, 0).contiguous(),
        tuple(selector.key for selector in selectors),
        cells.heads,
        cells.positions,
        cells.tokens,
        clean,
        corrupted,
        found.noise,
        start.name,
        noising,
        "" if paths is None else paths.name,
        names_of([pair.id for pair in pairs.pairs]),
    )
