"""Makes a report and probes from a capture and a label. One tensor is in memory at a time."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hookmap.activations import Key, call_of
from hookmap.analysis.intervals import auroc_interval
from hookmap.analysis.probes import report as documents
from hookmap.analysis.probes.controls import controls
from hookmap.analysis.probes.examples import Examples, read_examples
from hookmap.analysis.probes.fitting import METHODS, Fitted, directions, moments, platt
from hookmap.analysis.probes.folds import Choice, grouped_folds, held_out, pooled, shuffles
from hookmap.analysis.probes.metrics import Floats, Ints, Labels, calibration, independent, recall_at
from hookmap.analysis.probes.pooling import RowLengths, chosen_positions, matrices, probed_positions
from hookmap.analysis.probes.report import Report, number
from hookmap.analysis.probes.saved import About, Probes
from hookmap.capture.result import Capture
from hookmap.errors import SelectionError
from hookmap.maps.points import FEATURES, PointName
from hookmap.stores.interface import Store

log = logging.getLogger("hookmap")

MEMORY = 2 * 10**9
SHUFFLES = 100
NOTHING_VARIES = "no feature varies over the samples"
_Candidate = tuple[Key, int | None]
"""tensor, position"""


@dataclass(frozen=True)
class Probing:
    """The result of `probe`."""

    report: Report
    probes: Probes
    """one for each tensor, fitted on all samples; with pool="each", at the best position"""

    def save(self, folder: str | Path) -> list[Path]:
        """Write the report, charts, probes, and a steering vector for each point with layers. Raises StoreError.

        Of layers that run several times there is one for each call, vector-POINT-call2.safetensors.
        A tensor in which no feature varies has no probe; `why` in the report's `places` says so.
        """
        target = Path(folder)
        written = documents.save_report(self.report, target)
        written.append(self.probes.save(target / documents.PROBES))
        layered = [key for key in self.probes.weights if key[1] is not None]
        written_to = [key for key in layered if PointName.of(key[0]).base != FEATURES]  # no run writes features
        for point, call in dict.fromkeys((key[0], call_of(key)) for key in written_to):
            name = f"vector-{point}" if call is None else f"vector-{point}-call{call}"
            written.append(self.probes.vector(point, call).save(target / f"{name}.safetensors"))
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
    """Cross-validate a linear probe of `label` on each tensor of a capture, and choose one within the training folds.

    store: a capture in memory or on disk. label, labels, positive, above, group, limit: see `examples.read_examples`;
    labels is its table. points, layers: of those that the capture holds.
    method: logistic, ridge or mean_difference. folds: 3 at least. shuffles: of the labels; p is at least 1 in
    shuffles + 1.
    pool: which rows of a sample: last, last_prompt, mean, mean_prompt, mean_answer, or each position separately.
    positions: restricts the pool to these positions, named as for a capture. "1:" leaves out the first token, which is
    often an attention sink with 100 times the norm of the others. With pool="each", a slice such as slice(-8, 4),
    counted from the end of the prompt.
    memory: bytes that matrices may take. progress: called with the number of tensors done and of all tensors.
    Raises SelectionError for what the capture does not have, or where no feature varies; DataError for a broken table.
    """
    if method not in METHODS:
        raise SelectionError(f"method {method!r}: expected one of {', '.join(METHODS)}.")
    if shuffles < 1:
        raise SelectionError(f"shuffles: expected 1 at least, got {shuffles}.")
    model = getattr(getattr(store, "manifest", None), "model", None)
    depth, store = (store.map.num_layers, store.store) if isinstance(store, Capture) else (store.num_layers, store)
    keys = _keys(store, points, layers, depth)
    examples = read_examples(store, label, table=labels, positive=positive, above=above, group=group, limit=limit)
    wanted = probed_positions([store.sample(n) for n in examples.numbers], pool, positions)
    chosen = chosen_positions(pool, positions)
    trial = Trial(examples.labels, examples.groups, folds, shuffles, seed, method)
    read = partial(matrices, store, numbers=examples.numbers, pool=pool, memory=memory)
    lengths = {key: RowLengths() for key in keys}
    fitted: dict[Key, Fitted] = {}
    for done, key in enumerate(keys):
        for position, matrix in read(key, wanted=wanted, chosen=chosen, lengths=lengths[key]):
            if trial.take((key, position), matrix) and pool != "each":
                fitted[key] = trial.fit((key, position), matrix)
        if progress is not None:
            progress(done + 1, len(keys))
    best = trial.choice.best
    if best is None:
        raise SelectionError(f"there is nothing to probe: {NOTHING_VARIES} (probed: {len(trial.found)} tensors).")
    for key in keys if pool == "each" else ():  # the best position is known only now
        for _, matrix in read(key, wanted=[best[1]]):
            if (candidate := (key, best[1])) in trial.validated:
                fitted[key] = trial.fit(candidate, matrix)
    settings = {"pool": pool, "positions": _written(positions), "folds": folds, "shuffles": shuffles, "seed": seed}
    report = _report(store, examples, trial, lengths, best, model=model, method=method, **settings)
    if report.sink is not None:
        log.warning("%s", report.sink)
    return Probing(report, _probes(fitted, best, report))


def _report(
    store: Store,
    examples: Examples,
    trial: "Trial",
    lengths: Mapping[Key, RowLengths],
    best: _Candidate,
    **settings: Any,
) -> Report:
    return Report(
        store=str(getattr(store, "path", "memory")),
        label=examples.label,
        seconds=round(trial.seconds, 1),
        samples=len(examples.numbers),
        positives=int(examples.labels.sum()),
        questions=int(examples.groups.max()) + 1,
        left_out=sum(examples.left_out.values()),
        why_left_out=dict(examples.left_out),
        strangers=examples.strangers,
        chosen=_chosen(trial),
        best=_document(best),
        controls=_controls(store, examples.numbers, trial),
        places=tuple(_candidate_score(each, trial, lengths[each[0]]) for each in trial.found),
        **settings,
    )


def _written(positions: Any) -> str | None:
    """The positions as a user would type them."""
    if isinstance(positions, slice):
        return ":".join("" if end is None else str(end) for end in (positions.start, positions.stop))
    return None if positions is None else str(positions)


@dataclass(frozen=True)
class _CrossValidated:
    """The cross-validation of one candidate."""

    aurocs: Floats
    """[1 + shuffles]; the first is that of the labels"""
    scores: Floats
    """[samples], each from the probe that was not fitted on the sample"""


class Trial:
    """The labels and their shuffles, on which every candidate is tried."""

    def __init__(self, labels: Labels, groups: Ints, folds: int, count: int, seed: int, method: str) -> None:
        self.labels, self._method = labels, method
        self.folds = grouped_folds(labels, groups, folds, seed)
        self._all = shuffles(labels, groups, self.folds, count, seed)
        self._counts = independent(labels, groups)
        self.choice = Choice[_Candidate](self._all, self.folds)
        self.found: list[_Candidate] = []
        """all candidates, in order"""
        self.validated: dict[_Candidate, _CrossValidated] = {}
        """those in which a feature varies"""
        self.seconds = 0.0
        """spent on fits"""

    def take(self, candidate: _Candidate, matrix: Any) -> bool:
        """Cross-validate the next candidate. Returns whether any feature varies in it."""
        begun = time.perf_counter()
        self.found.append(candidate)
        if varies := bool(moments(matrix)[1].any()):
            found = held_out(matrix, self._all, self.folds, self._method)
            self.choice.take(candidate, found)
            self.validated[candidate] = _CrossValidated(pooled(found.outer, found.pairs), found.of_own(self.folds))
        self.seconds += time.perf_counter() - begun
        return varies

    def fit(self, candidate: _Candidate, matrix: Any) -> Fitted:
        """The probe fitted on all samples; its logits are scaled on held-out scores."""
        weights, biases = directions(matrix, self.labels[None], self._method)
        factor, shift = platt(self.validated[candidate].scores, self.labels)
        return Fitted(weights[:, 0] * factor, float(biases[0]) * factor + shift)

    def score(self, auroc: float) -> dict[str, Any]:
        """The AUROC with its interval."""
        return auroc_score(auroc, self._counts, int(self.folds.max()) + 1)

    def tested(self, auroc: float, by_chance: Floats, most: Floats) -> dict[str, Any]:
        """The comparison with shuffled labels. by_chance: the AUROC of each shuffle. most: those that p counts."""
        mean = float(np.nanmean(by_chance))
        return {"shuffled": mean, "selectivity": auroc - mean, "p": p_value(auroc, most)}

    @property
    def most(self) -> Floats:
        """[shuffles]: the best AUROC of all candidates, which corrects p for the number of candidates."""
        return np.asarray(np.max([each.aurocs[1:] for each in self.validated.values()], axis=0))


def auroc_score(auroc: float, counts: tuple[float, float], folds: int) -> dict[str, float | None]:
    """The AUROC with its interval, corrected for folds that share training data (Nadeau and Bengio 2003).

    counts: independent positives and negatives.
    """
    if np.isnan(auroc):
        return {"auroc": None, "low": None, "high": None}
    low, high = auroc_interval(auroc, *counts, inflation=1 + folds / (folds - 1))
    return {"auroc": auroc, "low": low, "high": high}


def p_value(found: float, by_chance: Floats) -> float:
    """The share of shuffles that are as good, counting the result itself as one (Phipson & Smyth 2010)."""
    return float((by_chance >= found - 1e-9).sum() + 1) / (len(by_chance) + 1)


def _keys(
    store: Store,
    points: str | Sequence[str] | Mapping[str, Any],
    layers: str | int | Sequence[int],
    depth: int | None,
) -> list[Key]:
    """The tensors to probe. depth: the number of layers, from which negative ones count. Raises SelectionError."""
    if isinstance(points, Mapping):  # each point with its own layers
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
            if name != "logits":  # as wide as the vocabulary: probed only if named
                found.append((name, None))
        elif chosen is None:
            found += store.keys_of(name)
        else:
            for layer in chosen:
                found += store.keys_of(name, layer + (depth or 0) if layer < 0 else layer)
    if not found:
        raise SelectionError("no tensor to probe: name points that the capture holds, see `hookmap inspect`.")
    return list(dict.fromkeys(found))


def _document(candidate: _Candidate) -> documents.Candidate:
    key, position = candidate
    return documents.Candidate(point=key[0], layer=key[1], call=call_of(key), position=position)


def _candidate_score(candidate: _Candidate, trial: Trial, lengths: RowLengths) -> documents.CandidateScore:
    where: dict[str, Any] = {"largest_share": lengths.share, "largest_ratio": lengths.ratio}
    where |= _document(candidate).model_dump()
    if candidate not in trial.validated:
        return documents.CandidateScore(**where, auroc=None, low=None, high=None, why=NOTHING_VARIES)
    own, *by_chance = trial.validated[candidate].aurocs.tolist()
    return documents.CandidateScore(**where, **trial.score(own), **trial.tested(own, np.array(by_chance), trial.most))


def _chosen(trial: Trial) -> documents.Chosen:
    logits = trial.choice.logits()
    own, by_chance = float(trial.choice.aurocs[0]), trial.choice.aurocs[1:]
    calibrated = calibration(trial.labels, 1 / (1 + np.exp(-np.clip(logits, -500, 500))))
    return documents.Chosen(
        **trial.score(own),
        **trial.tested(own, by_chance, by_chance),
        places=tuple(map(_document, trial.choice.places.values())),
        recall_at_1_percent=number(recall_at(trial.labels, logits)),
        brier=calibrated.brier,
        calibration_error=calibrated.error,
        calibration=tuple(documents.CalibrationBin(**vars(b)) for b in calibrated.bins),
    )


def _controls(store: Store, numbers: Sequence[int], trial: Trial) -> tuple[documents.ControlScore, ...]:
    return tuple(
        documents.ControlScore(
            name=control.name,
            why=control.why,
            sees_answer=control.sees_answer,
            **trial.score(float("nan") if control.auroc is None else control.auroc),
        )
        for control in controls(store, numbers, trial.labels, trial.folds)
    )


def _probes(fitted: Mapping[Key, Fitted], best: _Candidate, report: Report) -> Probes:
    told = report.model_dump(include={"label", "method", "pool", "positions", "model", "samples"})
    about = About(position=best[1], **told)
    weights = {key: torch.from_numpy(one.weights).float() for key, one in fitted.items()}
    return Probes(about, weights, {key: float(np.float32(one.bias)) for key, one in fitted.items()})
