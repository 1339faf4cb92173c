"""Cross-validation that keeps all samples of a question in one fold, and the choice among tensors inside it."""

from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any, Generic, TypeVar

import numpy as np

from hookmap.analysis.probes.fitting import STRENGTH, directions, platt, sklearn
from hookmap.analysis.probes.metrics import Floats, Ints, Labels, won_pairs
from hookmap.errors import SelectionError

LEAST_FOLDS = 3
"""one to test, one to choose, one to train"""
Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class HeldOut:
    """The results of a cross-validation that leaves out each fold, and each pair of folds."""

    scores: Floats
    """[samples, folds], of the first labelling: by the probe trained without this fold and the sample's own"""
    won: Floats
    """[labellings, folds, folds]: pairs won within the first fold by the probe trained without both"""
    pairs: Floats
    """[labellings, folds]: all pairs within each fold"""

    @property
    def outer(self) -> Floats:
        """[labellings, folds]: pairs won within each fold by the probe trained on all others."""
        return np.asarray(np.diagonal(self.won, axis1=1, axis2=2))

    @property
    def inner(self) -> Floats:
        """[labellings, folds]: AUROC within the training part of each fold, 0 where there are no pairs."""
        rest = self.won.sum(axis=1) - self.outer
        pairs = self.pairs.sum(axis=1, keepdims=True) - self.pairs
        return np.asarray(np.divide(rest, pairs, out=np.zeros_like(rest), where=pairs > 0))

    def of_own(self, folds: Ints) -> Floats:
        """[samples]: each scored by the probe trained on all other folds."""
        return np.asarray(self.scores[np.arange(len(folds)), folds])


def pooled(won: Floats, pairs: Floats) -> Floats:
    """AUROC of [labellings, folds] -> [labellings]; nan without pairs."""
    total = pairs.sum(axis=1)
    return np.asarray(np.divide(won.sum(axis=1), total, out=np.full(len(won), np.nan), where=total > 0))


def grouped_folds(labels: Labels, groups: Ints, folds: int, seed: int) -> Ints:
    """The fold of each sample. A group is in one fold; the shares of positives are as even as the groups allow.

    Raises SelectionError where there are too few groups with positives, or with negatives.
    """
    splitter = sklearn("model_selection").StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    least = min(len(set(groups[labels].tolist())), len(set(groups[~labels].tolist())))
    if folds < LEAST_FOLDS or least < folds:
        raise SelectionError(
            f"{folds} folds need at least as many questions with the label, and without it: there are {least} of the "
            f"rarer kind. Give more samples, or fewer folds ({LEAST_FOLDS} at least)."
        )
    found = np.empty(len(labels), dtype=np.int64)
    for number, (_, test) in enumerate(splitter.split(np.zeros(len(labels)), labels, groups)):
        found[test] = number
    for number in range(folds):
        if labels[found != number].all() or not labels[found != number].any():
            raise SelectionError(
                f"{folds} folds: all samples with the label are in one of them, for few questions have most samples. "
                "Give more questions, or another seed."
            )
    return found


def held_out(matrix: Any, labels: Labels, folds: Ints, method: str, strength: float = STRENGTH) -> HeldOut:
    """Fit without each fold, for the test, and without each pair of folds, for the choice within the training part.

    labels: [labellings, samples], all fitted together. Raises SelectionError without scikit-learn.
    """
    count = int(folds.max()) + 1
    inside = [np.flatnonzero(folds == number) for number in range(count)]
    scores, won = np.zeros((len(folds), count)), np.zeros((len(labels), count, count))
    pairs = np.zeros((len(labels), count))
    for one, other in combinations_with_replacement(range(count), 2):
        train = np.flatnonzero((folds != one) & (folds != other))
        weights, biases = directions(matrix[train], labels[:, train], method, strength)
        for own, left in {(one, other), (other, one)}:
            said = np.asarray(matrix[inside[own]] @ weights) + biases
            scores[inside[own], left] = said[:, 0]
            won[:, own, left], pairs[:, own] = won_pairs(labels[:, inside[own]], said.T)
    return HeldOut(scores, won, pairs)


def shuffle(labels: Labels, groups: Ints, chance: np.random.Generator) -> Labels:
    """The labels permuted among questions: a question gets all labels of another, in random order.

    Samples of one question are alike. Permuted one by one they would count as independent, and shuffled labels would
    vary less by chance than the real ones. Where questions differ in size and labels differ within them, the labels
    that are left over go to the next question.
    """
    count = int(groups.max()) + 1
    firsts = np.zeros(count, dtype=bool)
    firsts[groups] = labels
    if (firsts[groups] == labels).all():
        return np.asarray(chance.permutation(firsts)[groups], dtype=bool)
    dealt = np.empty_like(labels)
    taken, given = (np.lexsort((chance.random(len(labels)), chance.permutation(count)[groups])) for _ in range(2))
    dealt[given] = labels[taken]
    return dealt


def shuffles(labels: Labels, groups: Ints, folds: Ints, count: int, seed: int) -> Labels:
    """[1 + count, samples]: the labels, then `count` shuffles of them among the questions of each fold.

    Within folds, because the folds are stratified by the labels: so each shuffle has the same shares of positives.
    """
    chance = np.random.default_rng(seed)
    found = np.repeat(labels[None], 1 + count, axis=0)
    for number in np.unique(folds):
        inside = np.flatnonzero(folds == number)
        _, names = np.unique(groups[inside], return_inverse=True)
        for row in range(1, 1 + count):
            found[row, inside] = shuffle(labels[inside], names, chance)
    return found


class Choice(Generic[Candidate]):
    """Chooses for each fold the candidate whose probe does best *within the training part*; candidates come in turn.

    The test part of a fold has no influence on the choice, so the resulting AUROC is not biased by it. Each labelling
    has its own choice; `places` and scores are those of the first.
    """

    def __init__(self, labels: Labels, folds: Ints) -> None:
        """labels: [labellings, samples]. folds: of each sample."""
        count = int(folds.max()) + 1
        self._labels, self._folds = labels[0], folds
        self.best: Candidate | None = None
        """the candidate with the best mean of inner AUROCs, whose probe on all samples is the one to use"""
        self.places: dict[int, Candidate] = {}
        """fold -> its chosen candidate"""
        self._scores = np.zeros((len(folds), count))
        self._won, self._pairs = np.zeros((len(labels), count)), np.zeros((len(labels), count))
        self._inner, self._mean = np.full((len(labels), count), -1.0), -1.0

    def take(self, place: Candidate, found: HeldOut) -> None:
        """Consider the next candidate. Of equally good ones the first is chosen."""
        inner = found.inner
        better = inner > self._inner
        self._inner[better], self._won[better], self._pairs = inner[better], found.outer[better], found.pairs
        for fold in np.flatnonzero(better[0]):
            self.places[int(fold)] = place
            self._scores[:, fold] = found.scores[:, fold]
        if inner[0].mean() > self._mean:
            self.best, self._mean = place, float(inner[0].mean())

    @property
    def aurocs(self) -> Floats:
        """[labellings]"""
        return pooled(self._won, self._pairs)

    def logits(self) -> Floats:
        """[samples]: the logit from the probe chosen for the sample's fold, scaled on scores held out in training."""
        found = np.zeros(len(self._folds))
        for fold in np.unique(self._folds):
            test = self._folds == fold
            factor, shift = platt(self._scores[~test, fold], self._labels[~test])
            found[test] = self._scores[test, fold] * factor + shift
        return found
