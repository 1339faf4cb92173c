"""How well scores separate positives from negatives. Pure: arrays in, numbers out.

Scores of cross-validation come from several probes, one for each fold. AUROC compares only scores of one fold: all
pairs of a positive and a negative within it, over all folds (`strata`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.bool_]
Ints = NDArray[np.int64]

FALSE_POSITIVES = 0.01


@dataclass(frozen=True)
class Bin:
    """Samples with about the same predicted probability."""

    samples: int
    probability: float
    """mean prediction"""
    positives: float
    """share of positive samples"""


@dataclass(frozen=True)
class Calibration:
    """How well predicted probabilities agree with the share of positives."""

    brier: float
    """mean squared error of the probabilities: 0 is perfect; always saying the share of positives p gives p(1 - p)"""
    error: float
    """expected calibration error: mean distance of `probability` and `positives` over the bins, by their samples"""
    bins: tuple[Bin, ...]


def auroc(labels: Labels, scores: Floats, strata: Ints | None = None) -> float:
    """How often a positive scores above a negative; ties count half. nan where there is no such pair."""
    parts = np.zeros(len(labels), dtype=np.int64) if strata is None else strata
    found = [won_pairs(labels[None, parts == part], scores[None, parts == part]) for part in np.unique(parts)]
    won, pairs = (float(sum(numbers)[0]) for numbers in zip(*found, strict=True))
    return won / pairs if pairs else float("nan")


def won_pairs(labels: Labels, scores: Floats) -> tuple[Floats, Floats]:
    """Pairs in which the positive scores above the negative, and all pairs: [labellings, samples] -> [labellings]."""
    from scipy.stats import rankdata

    ranks = rankdata(scores, axis=1)
    positives = labels.sum(axis=1).astype(np.float64)
    won = np.where(labels, ranks, 0.0).sum(axis=1) - positives * (positives + 1) / 2
    return won, positives * (labels.shape[1] - positives)


def independent(labels: Labels, groups: Ints) -> tuple[float, float]:
    """The effective numbers (Kish) of independent positives and negatives, where samples of one question are alike.

    Questions of equal size count once each; fewer are effective where some have most of the samples.
    """
    counts = (np.bincount(groups[labels == kind]).astype(np.float64) for kind in (True, False))
    positives, negatives = (float(count.sum() ** 2 / (count**2).sum()) for count in counts)
    return positives, negatives


def recall_at(labels: Labels, scores: Floats, false_positives: float = FALSE_POSITIVES) -> float:
    """Recall at the lowest threshold that at most this share of the negatives exceeds.

    With fewer than 100 negatives and 1 %, none may pass. nan without positives or negatives.
    """
    negatives, positives = np.sort(scores[~labels])[::-1], scores[labels]
    if not len(negatives) or not len(positives):
        return float("nan")
    allowed = int(np.floor(false_positives * len(negatives) + 1e-9))
    if allowed >= len(negatives):
        return 1.0
    return float((positives > negatives[allowed]).mean())


def calibration(labels: Labels, probabilities: Floats, bins: int = 10) -> Calibration:
    """Predicted probabilities, in bins of equal width, compared with the share of positives."""
    place = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    found = tuple(
        Bin(int(inside.sum()), float(probabilities[inside].mean()), float(labels[inside].mean()))
        for inside in (place == number for number in range(bins))
        if inside.any()
    )
    error = sum(b.samples * abs(b.probability - b.positives) for b in found) / max(1, len(labels))
    return Calibration(float(((probabilities - labels) ** 2).mean()), float(error), found)
