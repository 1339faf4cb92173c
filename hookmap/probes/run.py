"""A capture and a label -> a report and probes. One tensor is in memory at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hookmap.activations import Key
from hookmap.errors import SelectionError
from hookmap.probes import report as documents
from hookmap.probes.controls import controls
from hookmap.probes.examples import Examples, read_examples
from hookmap.probes.fitting import METHODS, Fitted, fit
from hookmap.probes.folds import OutOfFold, best_of_all, choose, grouped_folds, out_of_fold
from hookmap.probes.metrics import Floats, Ints, Labels, auroc_interval, calibration, recall_at
from hookmap.probes.metrics import auroc as area
from hookmap.probes.pooling import matrices, places
from hookmap.probes.report import Report, number
from hookmap.probes.saved import About, Probes
from hookmap.stores.interface import Store

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


@dataclass
class _Found:
    """Of each place, as its matrix passed by."""

    real: dict[_Place, OutOfFold]
    shuffled: dict[_Place, OutOfFold]
    fitted: dict[_Place, Fitted]


def probe(
    store: Store,
    label: str = "correct",
    points: str | Sequence[str] = "all",
    layers: str | int | Sequence[int] = "all",
    *,
    labels: Any = None,
    positive: Any = None,
    above: float | None = None,
    group: str | None = None,
    limit: int | None = None,
    method: str = "logistic",
    pool: str = "last",
    positions: slice | None = None,
    folds: int = 5,
    seed: int = 0,
    memory: int = MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> Probing:
    """Cross-validate a linear probe of `label` on each tensor of a capture, and choose among them honestly.

    label, labels, positive, above, group, limit: see `examples.read_examples`; labels is its table.
    points, layers: of those that the capture holds. method: logistic, ridge or mean_difference.
    pool: which rows of a sample: last, last_prompt, mean, mean_prompt, mean_answer, or each position by itself, of
    which positions=slice(-8, 4) are taken, counted from the end of the prompt.
    memory: bytes that matrices may take. progress: called with tensors done and all of them.
    Raises SelectionError for what the capture does not have, DataError for a broken table.
    """
    if method not in METHODS:
        raise SelectionError(f"method {method!r}: expected one of {', '.join(METHODS)}.")
    keys = _keys(store, points, layers)
    examples = read_examples(store, label, table=labels, positive=positive, above=above, group=group, limit=limit)
    wanted = places([store.sample(n) for n in examples.numbers], pool, positions)
    split = grouped_folds(examples.labels, examples.groups, folds, seed)
    mixed = shuffle(examples.labels, examples.groups, seed)
    mixed_split = grouped_folds(mixed, examples.groups, folds, seed)
    inner = len(keys) * len(wanted) > 1
    found = _Found({}, {}, {})
    for done, key in enumerate(keys):
        for position, matrix in matrices(store, key, examples.numbers, pool, wanted, memory):
            place = (*key, position)
            found.real[place] = out_of_fold(matrix, examples.labels, examples.groups, split, method, inner=inner)
            found.shuffled[place] = out_of_fold(matrix, mixed, examples.groups, mixed_split, method, inner=inner)
            found.fitted[place] = fit(matrix, examples.labels, method)
        if progress is not None:
            progress(done + 1, len(keys))
    best = best_of_all(found.real)
    report = Report(
        store=str(getattr(store, "path", "memory")),
        model=getattr(getattr(store, "manifest", None), "model", None),
        label=examples.label,
        method=method,
        pool=pool,
        folds=folds,
        seed=seed,
        samples=len(examples.numbers),
        positives=int(examples.labels.sum()),
        questions=int(examples.groups.max()) + 1,
        left_out=examples.left_out,
        chosen=_chosen(found, examples, split, mixed, mixed_split, seed),
        best=_place(best),
        controls=_controls(store, examples, split, seed),
        places=tuple(_of_place(found, place, examples, split, mixed, mixed_split, seed) for place in found.real),
    )
    return Probing(report, _probes(found, best, report))


def shuffle(labels: Labels, groups: Ints, seed: int) -> Labels:
    """The labels, dealt anew: among questions where all samples of a question have one label, else among samples."""
    chance = np.random.default_rng(seed)
    firsts = np.zeros(int(groups.max()) + 1, dtype=bool)
    firsts[groups] = labels
    if (firsts[groups] == labels).all():
        return np.asarray(chance.permutation(firsts)[groups], dtype=bool)
    return np.asarray(chance.permutation(labels), dtype=bool)


def _keys(store: Store, points: str | Sequence[str], layers: str | int | Sequence[int]) -> list[Key]:
    """Raises SelectionError for what the capture does not hold."""
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
            found += [key for key in store.keys if key[0] == name] or [store.key(name)]
        else:
            found += [store.key(name, layer) for layer in chosen]
    if not found:
        raise SelectionError("no tensor to probe: name points that the capture holds, see `hookmap inspect`.")
    return list(dict.fromkeys(found))


def _score(labels: Labels, logits: Floats, split: Ints, groups: Ints, seed: int, resamples: int = 1000) -> Any:
    low, high = auroc_interval(labels, logits, split, groups, seed, resamples)
    return {"auroc": number(area(labels, logits, split)), "low": number(low), "high": number(high)}


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _place(place: _Place) -> documents.Place:
    point, layer, position = place
    return documents.Place(point=point, layer=layer, position=position)


def _of_place(
    found: _Found, place: _Place, examples: Examples, split: Ints, mixed: Labels, mixed_split: Ints, seed: int
) -> documents.OfPlace:
    score = _score(
        examples.labels, found.real[place].logits, split, examples.groups, seed, resamples=RESAMPLES_OF_A_PLACE
    )
    shuffled = number(area(mixed, found.shuffled[place].logits, mixed_split))
    selectivity = _minus(score["auroc"], shuffled)
    return documents.OfPlace(**_place(place).model_dump(), **score, shuffled=shuffled, selectivity=selectivity)


def _chosen(
    found: _Found, examples: Examples, split: Ints, mixed: Labels, mixed_split: Ints, seed: int
) -> documents.Chosen:
    logits, chosen = choose(found.real, split)
    by_chance, _ = choose(found.shuffled, mixed_split)
    score = _score(examples.labels, logits, split, examples.groups, seed)
    shuffled = documents.Score(**_score(mixed, by_chance, mixed_split, examples.groups, seed))
    calibrated = calibration(examples.labels, 1 / (1 + np.exp(-np.clip(logits, -500, 500))))
    return documents.Chosen(
        **score,
        places=tuple(map(_place, chosen)),
        recall_at_1_percent=number(recall_at(examples.labels, logits)),
        brier=calibrated.brier,
        calibration_error=calibrated.error,
        calibration=tuple(documents.CalibrationBin(**vars(b)) for b in calibrated.bins),
        shuffled=shuffled,
        selectivity=_minus(score["auroc"], shuffled.auroc),
    )


def _controls(store: Store, examples: Examples, split: Ints, seed: int) -> tuple[documents.OfControl, ...]:
    nothing: dict[str, Any] = {"auroc": None, "low": None, "high": None}
    return tuple(
        documents.OfControl(
            name=control.name,
            why=control.why,
            sees_answer=control.sees_answer,
            **(
                nothing
                if control.logits is None
                else _score(examples.labels, control.logits, split, examples.groups, seed)
            ),
        )
        for control in controls(store, examples.numbers, examples.labels, examples.groups, split)
    )


def _probes(found: _Found, best: _Place, report: Report) -> Probes:
    """Of each tensor; where each position is probed, at the position of the best."""
    kept = {(point, layer): fitted for (point, layer, at), fitted in found.fitted.items() if at == best[2]}
    about = About(
        label=report.label,
        method=report.method,
        pool=report.pool,
        position=best[2],
        model=report.model,
        samples=report.samples,
    )
    weights = {key: torch.from_numpy(fitted.weights).float() for key, fitted in kept.items()}
    return Probes(about, weights, {key: float(np.float32(fitted.bias)) for key, fitted in kept.items()})
