"""Cross-validation in which all samples of a question are on one side, and the choice among tensors inside it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from hookmap.errors import SelectionError
from hookmap.probes.fitting import MISSING, fit
from hookmap.probes.metrics import Floats, Ints, Labels, auroc

INNER = 3
Place = TypeVar("Place")


@dataclass(frozen=True)
class OutOfFold:
    """What probes said of samples that they were not fitted on."""

    logits: Floats
    """[samples]"""
    inner: Floats
    """[folds]: AUROC of cross-validation within the fold's training part"""


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


def out_of_fold(matrix: Any, labels: Labels, groups: Ints, folds: Ints, method: str, *, inner: bool) -> OutOfFold:
    """Fit on all folds but one, score that one. `inner`: cross-validate each training part too, else that is nan."""
    logits, within = np.zeros(len(labels)), []
    for train, test in _splits(folds):
        logits[test] = fit(matrix[train], labels[train], method).logits(matrix[test])
        within.append(_inner(matrix, labels, groups, train, method) if inner else float("nan"))
    return OutOfFold(logits, np.array(within))


def _splits(folds: Ints) -> Iterator[tuple[Ints, Ints]]:
    for number in np.unique(folds):
        yield np.flatnonzero(folds != number), np.flatnonzero(folds == number)


def _inner(matrix: Any, labels: Labels, groups: Ints, train: Ints, method: str) -> float:
    mine, names = labels[train], groups[train]
    least = min(len(set(names[mine].tolist())), len(set(names[~mine].tolist())))
    if least < 2:
        return float("nan")
    folds = grouped_folds(mine, names, min(INNER, least), seed=0)
    logits = np.zeros(len(train))
    for fitted, held in _splits(folds):
        logits[held] = fit(matrix[train[fitted]], mine[fitted], method).logits(matrix[train[held]])
    return auroc(mine, logits, folds)


def choose(found: Mapping[Place, OutOfFold], folds: Ints) -> tuple[Floats, list[Place]]:
    """In each fold the place whose probe did best *within the training part*: its logits, and which it was.

    The test part of a fold has no say in the choice, so the AUROC of what comes out is not that of the best of many.
    """
    places, logits, chosen = list(found), np.zeros(len(folds)), []
    for number, fold in enumerate(np.unique(folds)):
        best = _best(places, lambda place, number=number: float(found[place].inner[number]))  # type: ignore[misc]
        chosen.append(best)
        logits[folds == fold] = found[best].logits[folds == fold]
    return logits, chosen


def best_of_all(found: Mapping[Place, OutOfFold]) -> Place:
    """The place with the best mean of its inner AUROCs: where the probe that is kept is fitted, on all samples."""
    return _best(list(found), lambda place: float(np.mean(found[place].inner)))


def _best(places: Sequence[Place], score: Callable[[Place], float]) -> Place:
    return max(places, key=lambda place: (not np.isnan(score(place)), np.nan_to_num(score(place))))
