"""A capture and a label -> a report and probes. One tensor is in memory at a time."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hookmap.activations import Key
from hookmap.analysis.intervals import auroc_interval
from hookmap.analysis.probes import report as documents
from hookmap.analysis.probes.controls import controls
from hookmap.analysis.probes.examples import read_examples
from hookmap.analysis.probes.fitting import METHODS, Fitted, directions, moments, platt
from hookmap.analysis.probes.folds import Choice, grouped_folds, held_out, pooled, shuffles
from hookmap.analysis.probes.metrics import Floats, Ints, Labels, calibration, independent, recall_at
from hookmap.analysis.probes.pooling import RowLengths, chosen_positions, matrices, places
from hookmap.analysis.probes.report import Report, number
from hookmap.analysis.probes.saved import About, Probes
from hookmap.capture.result import Capture
from hookmap.errors import SelectionError
from hookmap.stores.interface import Store

log = logging.getLogger("hookmap")

MEMORY = 2 * 10**9
SHUFFLES = 100
NOTHING_VARIES = "no feature varies over the samples"
_Place = tuple[str, int | None, int | None]
"""point, layer, position"""


@dataclass(frozen=True)
class Probing:
    """What `probe` found."""

    report: Report
    probes: Probes
    """of each tensor, fitted on all samples; where each position is probed, of the best position"""

    def save(self, folder: str | Path) -> list[Path]:
        """Write report, pictures, probes, and for each point with layers a steering vector. Raises StoreError.

        Where nothing varies there is no probe: `why` of the report's place says so.
        """
        target = Path(folder)
        written = documents.save_report(self.report, target)
        written.append(self.probes.save(target / documents.PROBES))
        for point in dict.fromkeys(name for name, layer in self.probes.weights if layer is not None):
            written.append(self.probes.vector(point).save(target / f"vector-{point}.safetensors"))
        return written


def probe(
    store: Store | Capture,
    label: str = "correct",
    points: str | Sequence[str] | Mapping[str, Any] = "all",
    layers: str | int | Sequence[int] = "all",
    *,
    labels: Any = None,
    positive: Any = None,
    above: float | None = None,
    group: str | None = None,
    limit: int | None = None,
    method: str = "logistic",
    pool: str = "last",
    positions: Any = None,
    folds: int = 5,
    shuffles: int = SHUFFLES,
    seed: int = 0,
    memory: int = MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> Probing:
    """Cross-validate a linear probe of `label` on each tensor of a capture, and choose among them honestly.

    store: a capture in memory or on disk. label, labels, positive, above, group, limit: see `examples.read_examples`;
    labels is its table. points, layers: of those that the capture holds.
    method: logistic, ridge or mean_difference. folds: 3 at least. shuffles: of the labels; p is at least 1 in
    shuffles + 1.
    pool: which rows of a sample: last, last_prompt, mean, mean_prompt, mean_answer, or each position by itself.
    positions: the rows that a pool is of, as a capture names them: "1:" leaves the first token out, which is often an
    attention sink, 100 times as long as the others. With pool="each" a slice, slice(-8, 4), counted from the end of the
    prompt.
    memory: bytes that matrices may take. progress: called with tensors done and all of them.
    Raises SelectionError for what the capture does not have, or where no feature varies, DataError for a broken table.
    """
    if method not in METHODS:
        raise SelectionError(f"method {method!r}: expected one of {', '.join(METHODS)}.")
    if shuffles < 1:
        raise SelectionError(f"shuffles: expected 1 at least, got {shuffles}.")
    model = getattr(getattr(store, "manifest", None), "model", None)
    depth, store = (store.map.num_layers, store.store) if isinstance(store, Capture) else (store.num_layers, store)
    keys = _keys(store, points, layers, depth)
    examples = read_examples(store, label, table=labels, positive=positive, above=above, group=group, limit=limit)
    wanted = places([store.sample(n) for n in examples.numbers], pool, positions)
    chosen = chosen_positions(pool, positions)
    trial = Trial(examples.labels, examples.groups, folds, shuffles, seed, method)
    fitted: dict[Key, Fitted] = {}
    unlike: dict[Key, RowLengths] = {}
    for done, key in enumerate(keys):
        unlike[key] = RowLengths()
        for position, matrix in matrices(store, key, examples.numbers, pool, wanted, memory, chosen, unlike[key]):
            if trial.take((*key, position), matrix) and pool != "each":
                fitted[key] = trial.fit((*key, position), matrix)
        if progress is not None:
            progress(done + 1, len(keys))
    best = trial.choice.best
    if best is None:
        raise SelectionError(f"there is nothing to probe: {NOTHING_VARIES} (probed: {len(trial.found)} tensors).")
    for key in keys if pool == "each" else ():  # where it is best is known at the end
        for _, matrix in matrices(store, key, examples.numbers, pool, [best[2]], memory):
            if (place := (*key, best[2])) in trial.told:
                fitted[key] = trial.fit(place, matrix)
    report = Report(
        store=str(getattr(store, "path", "memory")),
        model=model,
        label=examples.label,
        method=method,
        pool=pool,
        positions=_written(positions),
        folds=folds,
        shuffles=shuffles,
        seconds=round(trial.seconds, 1),
        seed=seed,
        samples=len(examples.numbers),
        positives=int(examples.labels.sum()),
        questions=int(examples.groups.max()) + 1,
        left_out=sum(examples.left_out.values()),
        why_left_out=dict(examples.left_out),
        strangers=examples.strangers,
        chosen=_chosen(trial),
        best=_place(best),
        controls=_controls(store, examples.numbers, trial),
        places=tuple(_of_place(place, trial, unlike[place[:2]]) for place in trial.found),
    )
    if report.sink is not None:
        log.warning("%s", report.sink)
    return Probing(report, _probes(fitted, best, report))


def _written(positions: Any) -> str | None:
    """As it would be typed."""
    if isinstance(positions, slice):
        return ":".join("" if end is None else str(end) for end in (positions.start, positions.stop))
    return None if positions is None else str(positions)


@dataclass(frozen=True)
class _Told:
    """What the cross-validation of one place says."""

    aurocs: Floats
    """[1 + shuffles], of the labels first"""
    scores: Floats
    """[samples], each by the probe that was not fitted on it"""


class Trial:
    """The labels and their shuffles, before which all places pass."""

    def __init__(self, labels: Labels, groups: Ints, folds: int, count: int, seed: int, method: str) -> None:
        self.labels, self._method = labels, method
        self.folds = grouped_folds(labels, groups, folds, seed)
        self._all = shuffles(labels, groups, self.folds, count, seed)
        self._counts = independent(labels, groups)
        self.choice = Choice[_Place](self._all, self.folds)
        self.found: list[_Place] = []
        """all places, in their order"""
        self.told: dict[_Place, _Told] = {}
        """those where something varies"""
        self.seconds = 0.0
        """of fits"""

    def take(self, place: _Place, matrix: Any) -> bool:
        """The next place. Whether any feature varies there."""
        begun = time.perf_counter()
        self.found.append(place)
        if varies := bool(moments(matrix)[1].any()):
            found = held_out(matrix, self._all, self.folds, self._method)
            self.choice.take(place, found)
            self.told[place] = _Told(pooled(found.outer, found.pairs), found.of_own(self.folds))
        self.seconds += time.perf_counter() - begun
        return varies

    def fit(self, place: _Place, matrix: Any) -> Fitted:
        """The probe for use, of all samples; its logits are scaled on what was held out."""
        weights, biases = directions(matrix, self.labels[None], self._method)
        factor, shift = platt(self.told[place].scores, self.labels)
        return Fitted(weights[:, 0] * factor, float(biases[0]) * factor + shift)

    def score(self, auroc: float) -> dict[str, Any]:
        """With its interval."""
        return auroc_score(auroc, self._counts, int(self.folds.max()) + 1)

    def tested(self, auroc: float, by_chance: Floats, most: Floats) -> dict[str, Any]:
        """Held against shuffled labels. by_chance: the same, shuffled; most: what is to be beaten, of each shuffle."""
        mean = float(np.nanmean(by_chance))
        return {"shuffled": mean, "selectivity": auroc - mean, "p": p_value(auroc, most)}

    @property
    def most(self) -> Floats:
        """[shuffles]: the best AUROC of all places. Held against it, each place is corrected for their number."""
        return np.asarray(np.max([told.aurocs[1:] for told in self.told.values()], axis=0))


def auroc_score(auroc: float, counts: tuple[float, float], folds: int) -> dict[str, float | None]:
    """With its interval. Probes of several folds share training data, for which Nadeau and Bengio (2003) allow.

    counts: independent positives and negatives.
    """
    if np.isnan(auroc):
        return {"auroc": None, "low": None, "high": None}
    low, high = auroc_interval(auroc, *counts, inflation=1 + folds / (folds - 1))
    return {"auroc": auroc, "low": low, "high": high}


def p_value(found: float, by_chance: Floats) -> float:
    """How often chance is as good, what was found being one of its draws (Phipson & Smyth 2010)."""
    return float((by_chance >= found - 1e-9).sum() + 1) / (len(by_chance) + 1)


def _keys(
    store: Store,
    points: str | Sequence[str] | Mapping[str, Any],
    layers: str | int | Sequence[int],
    depth: int | None,
) -> list[Key]:
    """depth: the model's layers, from which negative ones count. Raises SelectionError for what is not held."""
    if isinstance(points, Mapping):  # layers of its own for each
        if layers != "all":
            raise SelectionError("points name layers of their own: leave layers out.")
        return list(dict.fromkeys(key for name, own in points.items() for key in _keys(store, [name], own, depth)))
    names = store.points if points == "all" else [points] if isinstance(points, str) else points
    chosen = None if layers == "all" else [layers] if isinstance(layers, int) else layers
    if isinstance(chosen, str):
        raise SelectionError(f'layers {layers!r}: expected "all", a number or several.')
    found: list[Key] = []
    for name in names:
        if ("all" if points == "all" else name) == "all" and (name, None) in store.keys:
            if name != "logits":  # as wide as the vocabulary: a probe of it is asked for by its name
                found.append((name, None))
        elif chosen is None:
            found += store.keys_of(name)
        else:
            found += [store.key(name, layer + (depth or 0) if layer < 0 else layer) for layer in chosen]
    if not found:
        raise SelectionError("no tensor to probe: name points that the capture holds, see `hookmap inspect`.")
    return list(dict.fromkeys(found))


def _place(place: _Place) -> documents.Place:
    point, layer, position = place
    return documents.Place(point=point, layer=layer, position=position)


def _of_place(place: _Place, trial: Trial, lengths: RowLengths) -> documents.OfPlace:
    where: dict[str, Any] = {"largest_share": lengths.share, "largest_ratio": lengths.ratio}
    where |= _place(place).model_dump()
    if place not in trial.told:
        return documents.OfPlace(**where, auroc=None, low=None, high=None, why=NOTHING_VARIES)
    own, *by_chance = trial.told[place].aurocs.tolist()
    return documents.OfPlace(**where, **trial.score(own), **trial.tested(own, np.array(by_chance), trial.most))


def _chosen(trial: Trial) -> documents.Chosen:
    logits = trial.choice.logits()
    own, by_chance = float(trial.choice.aurocs[0]), trial.choice.aurocs[1:]
    calibrated = calibration(trial.labels, 1 / (1 + np.exp(-np.clip(logits, -500, 500))))
    return documents.Chosen(
        **trial.score(own),
        **trial.tested(own, by_chance, by_chance),
        places=tuple(map(_place, trial.choice.places.values())),
        recall_at_1_percent=number(recall_at(trial.labels, logits)),
        brier=calibrated.brier,
        calibration_error=calibrated.error,
        calibration=tuple(documents.CalibrationBin(**vars(b)) for b in calibrated.bins),
    )


def _controls(store: Store, numbers: Sequence[int], trial: Trial) -> tuple[documents.OfControl, ...]:
    return tuple(
        documents.OfControl(
            name=control.name,
            why=control.why,
            sees_answer=control.sees_answer,
            **trial.score(float("nan") if control.auroc is None else control.auroc),
        )
        for control in controls(store, numbers, trial.labels, trial.folds)
    )


def _probes(fitted: Mapping[Key, Fitted], best: _Place, report: Report) -> Probes:
    about = About(
        label=report.label,
        method=report.method,
        pool=report.pool,
        positions=report.positions,
        position=best[2],
        model=report.model,
        samples=report.samples,
    )
    weights = {key: torch.from_numpy(one.weights).float() for key, one in fitted.items()}
    return Probes(about, weights, {key: float(np.float32(one.bias)) for key, one in fitted.items()})
