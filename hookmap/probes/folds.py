"""Cross-validation in which all samples of a question are on one side, and the choice among tensors inside it."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeVar

import numpy as np

from hookmap.errors import SelectionError
from hookmap.probes.fitting import MISSING, directions, platt, scores
from hookmap.probes.metrics import Floats, Ints, Labels, auroc

INNER = 3
Place = TypeVar("Place")


@dataclass(frozen=True)
class Split:
    """A cross-validation, which is the same for every tensor."""

    folds: Ints
    """of each sample, 0-based"""
    within: tuple[Ints, ...] = ()
    """for each fold, the folds of its training part by itself, -1 for all other samples; () where nothing is chosen"""


@dataclass(frozen=True)
class OutOfFold:
    """What the probes of a cross-validation say, one for each fold."""

    scores: Floats
    """[samples, folds]: of all samples, those that the probe was fitted on too; not calibrated"""
    inner: Floats
    """[folds]: AUROC of cross-validation within the fold's training part"""

    def held_out(self, folds: Ints) -> Floats:
        """[samples]: each scored by the probe that was not fitted on it."""
        return np.asarray(self.scores[np.arange(len(folds)), folds])


def grouped_folds(labels: Labels, groups: Ints, folds: int, seed: int) -> Ints:
    """The fold of each sample; a group is in one. Shares of positives are as even as the groups allow.

    Raises SelectionError where there are too few groups with positives, or with negatives.
    """
    try:
        from sklearn.model_selection import StratifiedGroupKFold
    except ImportError as error:
        raise SelectionError(f"{MISSING}\n({error})") from error
    least = min(len(set(groups[labels].tolist())), len(set(groups[~labels].tolist())))
    if folds < 2 or least < folds:
        raise SelectionError(
            f"{folds} folds need at least as many questions with the label, and without it: there are {least} of the "
            "rarer kind. Give more samples, or fewer folds (2 at least)."
        )
    found = np.empty(len(labels), dtype=np.int64)
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels, groups)
    for number, (_, test) in enumerate(split):
        found[test] = number
    return found


def nested(labels: Labels, groups: Ints, folds: int, seed: int) -> Split:
    """Grouped folds, and grouped folds within the training part of each. Raises as `grouped_folds` does."""
    outer = grouped_folds(labels, groups, folds, seed)
    return Split(outer, tuple(_within(labels, groups, train) for train, _ in _splits(outer)))


def _within(labels: Labels, groups: Ints, train: Ints) -> Ints:
    """All -1 where there are too few questions."""
    found = np.full(len(labels), -1, dtype=np.int64)
    mine, names = labels[train], groups[train]
    least = min(len(set(names[mine].tolist())), len(set(names[~mine].tolist())))
    if least >= 2:
        found[train] = grouped_folds(mine, names, min(INNER, least), seed=0)
    return found


def out_of_fold(matrix: Any, labels: Labels, split: Split, method: str) -> OutOfFold:
    """Fit on all folds but one, for each, and the same within each training part where the split says so."""
    cuts = (split.folds, *split.within)
    trains = [[train for train, _ in _splits(folds)] for folds in cuts]
    found = scores(matrix, directions(matrix, labels, list(chain(*trains)), method))
    outer, *inner = np.split(found, np.cumsum([len(parts) for parts in trains])[:-1], axis=1)
    within = [_auroc_within(labels, own, folds) for own, folds in zip(inner, split.within, strict=True)]
    return OutOfFold(outer, np.array(within or [np.nan] * outer.shape[1]))


def _splits(folds: Ints) -> Iterator[tuple[Ints, Ints]]:
    for number in np.unique(folds[folds >= 0]):
        yield np.flatnonzero((folds >= 0) & (folds != number)), np.flatnonzero(folds == number)


def _auroc_within(labels: Labels, found: Floats, folds: Ints) -> float:
    mine = np.flatnonzero(folds >= 0)
    return auroc(labels[mine], found[mine, folds[mine]], folds[mine])


class Choice(Generic[Place]):
    """In each fold the place whose probe did best *within the training part*; places come one after another.

    The test part of a fold has no say in the choice, so the AUROC of what comes out is not that of the best of many.
    """

    def __init__(self, folds: Ints) -> None:
        """`folds`: of each sample."""
        self._folds, count = folds, int(folds.max()) + 1
        self.best: Place | None = None
        """with the best mean of its inner AUROCs: where the probe that is kept is fitted, on all samples"""
        self.places: dict[int, Place] = {}
        """of each fold"""
        self._scores = np.zeros((len(folds), count))
        self._won = [(-1, 0.0)] * (count + 1)

    def take(self, place: Place, found: OutOfFold) -> None:
        """The next place. Of equal ones the first is chosen; one that could not be told is worse than all others."""
        for fold, score in enumerate(found.inner):
            if self._wins(fold, float(score)):
                self.places[fold] = place
                self._scores[:, fold] = found.scores[:, fold]
        if self._wins(len(found.inner), float(np.mean(found.inner))):
            self.best = place

    def _wins(self, number: int, score: float) -> bool:
        mine = (0, 0.0) if np.isnan(score) else (1, score)
        wins = mine > self._won[number]
        if wins:
            self._won[number] = mine
        return wins

    def logits(self, labels: Labels, method: str) -> Floats:
        """[samples]: what the chosen probe of its fold says of each, calibrated on the training part."""
        found = np.zeros(len(labels))
        for fold, (train, test) in enumerate(_splits(self._folds)):
            mine = self._scores[:, fold]
            factor, shift = platt(mine[train], labels[train], method)
            found[test] = mine[test] * factor + shift
        return found
