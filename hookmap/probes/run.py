"""A capture and a label -> a report and probes. One tensor is in memory at a time."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hookmap.activations import Key
from hookmap.errors import SelectionError
from hookmap.probes import report as documents
from hookmap.probes.controls import controls
from hookmap.probes.examples import read_examples
from hookmap.probes.fitting import METHODS, Fitted, fit
from hookmap.probes.folds import Choice, Split, grouped_folds, nested, out_of_fold
from hookmap.probes.metrics import Floats, Ints, Labels, auroc, auroc_interval, calibration, recall_at
from hookmap.probes.pooling import RowLengths, chosen_positions, matrices, places
from hookmap.probes.report import Report, number
from hookmap.probes.saved import About, Probes
from hookmap.stores.interface import Store

log = logging.getLogger("hookmap")

MEMORY = 2 * 10**9
RESAMPLES_OF_A_PLACE = 200
_Place = tuple[str, int | None, int | None]
"""point, layer, position"""


@dataclass(frozen=True)
class Probing:
    """What `probe` found."""

    report: Report
    probes: Probes
    """of each tensor, fitted on all samples; where each position is probed, of the best position"""

    def save(self, folder: str | Path) -> list[Path]:
        """Write report, pictures, probes, and for each point with layers a steering vector. Raises StoreError."""
        target = Path(folder)
        written = documents.save_report(self.report, target)
        written.append(self.probes.save(target / documents.PROBES))
        for point in dict.fromkeys(name for name, layer in self.probes.weights if layer is not None):
            if all(w.norm() > 0 for (name, _), w in self.probes.weights.items() if name == point):
                written.append(self.probes.vector(point).save(target / f"vector-{point}.safetensors"))
        return written


def probe(
    store: Store,
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
    seed: int = 0,
    memory: int = MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> Probing:
    """Cross-validate a linear probe of `label` on each tensor of a capture, and choose among them honestly.

    label, labels, positive, above, group, limit: see `examples.read_examples`; labels is its table.
    points, layers: of those that the capture holds. method: logistic, ridge or mean_difference.
    pool: which rows of a sample: last, last_prompt, mean, mean_prompt, mean_answer, or each position by itself.
    positions: the rows that a pool is of, as a capture names them: "1:" leaves the first token out, which is often an
    attention sink, 100 times as long as the others. With pool="each" a slice, slice(-8, 4), counted from the end of the
    prompt.
    memory: bytes that matrices may take. progress: called with tensors done and all of them.
    Raises SelectionError for what the capture does not have, DataError for a broken table.
    """
    if method not in METHODS:
        raise SelectionError(f"method {method!r}: expected one of {', '.join(METHODS)}.")
    keys = _keys(store, points, layers)
    examples = read_examples(store, label, table=labels, positive=positive, above=above, group=group, limit=limit)
    wanted = places([store.sample(n) for n in examples.numbers], pool, positions)
    chosen = chosen_positions(pool, positions)
    several = len(keys) * len(wanted) > 1
    real = _Trial.of(examples.labels, examples.groups, folds, seed, method, several)
    mixed = _Trial.of(shuffle(real.labels, real.groups, seed), real.groups, folds, seed, method, several)
    rows: list[documents.OfPlace] = []
    fitted: dict[Key, Fitted] = {}
    for done, key in enumerate(keys):
        lengths = RowLengths()
        for position, matrix in matrices(store, key, examples.numbers, pool, wanted, memory, chosen, lengths):
            place = (*key, position)
            found = _of_place(place, real, real.take(place, matrix), mixed, mixed.take(place, matrix))
            unlike = {"largest_share": lengths.share, "largest_ratio": lengths.ratio}
            rows.append(found.model_copy(update=unlike))
            if pool != "each":
                fitted[key] = fit(matrix, real.labels, method)
        if progress is not None:
            progress(done + 1, len(keys))
    best = real.choice.best or (*keys[0], wanted[0])
    for key in keys if pool == "each" else ():  # where it is best is known at the end
        for _, matrix in matrices(store, key, examples.numbers, pool, [best[2]], memory):
            fitted[key] = fit(matrix, real.labels, method)
    report = Report(
        store=str(getattr(store, "path", "memory")),
        model=getattr(getattr(store, "manifest", None), "model", None),
        label=examples.label,
        method=method,
        pool=pool,
        positions=_written(positions),
        folds=folds,
        seed=seed,
        samples=len(examples.numbers),
        positives=int(examples.labels.sum()),
        questions=int(examples.groups.max()) + 1,
        left_out=examples.left_out,
        chosen=_chosen(real, mixed),
        best=_place(best),
        controls=_controls(store, examples.numbers, real),
        places=tuple(rows),
    )
    if report.sink is not None:
        log.warning("%s", report.sink)
    return Probing(report, _probes(fitted, best, report))


def _written(positions: Any) -> str | None:
    """As it would be typed."""
    if isinstance(positions, slice):
        return ":".join("" if end is None else str(end) for end in (positions.start, positions.stop))
    return None if positions is None else str(positions)


def shuffle(labels: Labels, groups: Ints, seed: int) -> Labels:
    """The labels, dealt anew: a question gets those of another as a whole, in an order of chance.

    So what the shuffled labels can tell varies as much by chance as what the real ones can: samples of one question
    are alike, and dealt one by one they would be taken for evidence of their own. Where questions have more samples
    than others and labels differ within them, what is left of one question's goes to the next.
    """
    chance = np.random.default_rng(seed)
    count = int(groups.max()) + 1
    firsts = np.zeros(count, dtype=bool)
    firsts[groups] = labels
    if (firsts[groups] == labels).all():
        return np.asarray(chance.permutation(firsts)[groups], dtype=bool)
    dealt = np.empty_like(labels)
    taken, given = (np.lexsort((chance.random(len(labels)), chance.permutation(count)[groups])) for _ in range(2))
    dealt[given] = labels[taken]
    return dealt


@dataclass(frozen=True)
class _Trial:
    """One labelling of the samples, before which all places pass."""

    labels: Labels
    groups: Ints
    split: Split
    choice: Choice[_Place]
    method: str
    seed: int

    @classmethod
    def of(cls, labels: Labels, groups: Ints, folds: int, seed: int, method: str, several: bool) -> "_Trial":
        """several: places, among which one is chosen."""
        split = nested(labels, groups, folds, seed) if several else Split(grouped_folds(labels, groups, folds, seed))
        return cls(labels, groups, split, Choice(split.folds), method, seed)

    def take(self, place: _Place, matrix: Any) -> Floats:
        """Out-of-fold scores of the next place."""
        found = out_of_fold(matrix, self.labels, self.split, self.method)
        self.choice.take(place, found)
        return found.held_out(self.split.folds)

    def score(self, scores: Floats, resamples: int = 1000) -> dict[str, Any]:
        low, high = auroc_interval(self.labels, scores, self.split.folds, self.groups, self.seed, resamples)
        return {"auroc": self.auroc(scores), "low": number(low), "high": number(high)}

    def auroc(self, scores: Floats) -> float | None:
        return number(auroc(self.labels, scores, self.split.folds))


def _keys(
    store: Store, points: str | Sequence[str] | Mapping[str, Any], layers: str | int | Sequence[int]
) -> list[Key]:
    """Raises SelectionError for what the capture does not hold."""
    if isinstance(points, Mapping):  # layers of its own for each
        if layers != "all":
            raise SelectionError("points name layers of their own: leave layers out.")
        return list(dict.fromkeys(key for name, own in points.items() for key in _keys(store, [name], own)))
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
            found += [store.key(name, layer) for layer in chosen]
    if not found:
        raise SelectionError("no tensor to probe: name points that the capture holds, see `hookmap inspect`.")
    return list(dict.fromkeys(found))


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _place(place: _Place) -> documents.Place:
    point, layer, position = place
    return documents.Place(point=point, layer=layer, position=position)


def _of_place(place: _Place, real: _Trial, scores: Floats, mixed: _Trial, by_chance: Floats) -> documents.OfPlace:
    score, shuffled = real.score(scores, RESAMPLES_OF_A_PLACE), mixed.auroc(by_chance)
    selectivity = _minus(score["auroc"], shuffled)
    return documents.OfPlace(**_place(place).model_dump(), **score, shuffled=shuffled, selectivity=selectivity)


def _chosen(real: _Trial, mixed: _Trial) -> documents.Chosen:
    logits = real.choice.logits(real.labels, real.method)
    score = real.score(logits)
    shuffled = documents.Score(**mixed.score(mixed.choice.logits(mixed.labels, mixed.method)))
    calibrated = calibration(real.labels, 1 / (1 + np.exp(-np.clip(logits, -500, 500))))
    return documents.Chosen(
        **score,
        places=tuple(map(_place, real.choice.places.values())),
        recall_at_1_percent=number(recall_at(real.labels, logits)),
        brier=calibrated.brier,
        calibration_error=calibrated.error,
        calibration=tuple(documents.CalibrationBin(**vars(b)) for b in calibrated.bins),
        shuffled=shuffled,
        selectivity=_minus(score["auroc"], shuffled.auroc),
    )


def _controls(store: Store, numbers: Sequence[int], real: _Trial) -> tuple[documents.OfControl, ...]:
    nothing: dict[str, float | None] = {"auroc": None, "low": None, "high": None}
    return tuple(
        documents.OfControl(
            name=control.name,
            why=control.why,
            sees_answer=control.sees_answer,
            **(nothing if control.scores is None else real.score(control.scores)),
        )
        for control in controls(store, numbers, real.labels, real.split.folds)
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
