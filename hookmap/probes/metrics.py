"""How well scores tell positives from negatives. Pure: arrays in, numbers out.

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
_RESAMPLES = 1000
_AT_ONCE = 4_000_000
"""numbers of one matrix of resampled weights, 32 MB"""


@dataclass(frozen=True)
class Bin:
    """Samples to which a probe gave about the same probability."""

    samples: int
    probability: float
    """the mean of what the probe said"""
    positives: float
    """the share of them that are positive"""


@dataclass(frozen=True)
class Calibration:
    """Whether a probability of 0.7 comes true in 7 of 10 samples."""

    brier: float
    """mean squared error of the probabilities: 0 is perfect; always saying the share of positives p gives p(1 - p)"""
    error: float
    """expected calibration error: mean distance of `probability` and `positives` over the bins, by their samples"""
    bins: tuple[Bin, ...]


def auroc(labels: Labels, scores: Floats, strata: Ints | None = None) -> float:
    """How often a positive scores above a negative; ties count half. nan where there is no such pair."""
    weights = np.ones((1, len(labels)))
    return float(
        _auroc(labels, scores, np.zeros(len(labels), dtype=np.int64) if strata is None else strata, weights)[0]
    )


def auroc_interval(
    labels: Labels, scores: Floats, strata: Ints, groups: Ints, seed: int = 0, resamples: int = _RESAMPLES
) -> tuple[float, float]:
    """95 % percentile bootstrap: groups (questions) are drawn with replacement, each with all its samples.

    The probes are not fitted anew: the interval is that of this test set, not of the training.
    """
    draw, count = np.random.default_rng(seed), int(groups.max()) + 1
    found: list[Floats] = []
    step = max(1, _AT_ONCE // max(len(labels), count))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        times = np.stack([np.bincount(draw.integers(0, count, count), minlength=count) for _ in range(rows)])
        found.append(_auroc(labels, scores, strata, times[:, groups].astype(np.float64)))
    low, high = np.nanpercentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)


def _auroc(labels: Labels, scores: Floats, strata: Ints, weights: Floats) -> Floats:
    """For each row of weights [resamples, samples]: won pairs over pairs."""
    won, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for stratum in np.unique(strata):
        inside = np.flatnonzero(strata == stratum)
        order = inside[np.argsort(scores[inside], kind="stable")]
        sorted_scores, positive = scores[order], labels[order]
        negative = np.where(positive, 0.0, weights[:, order])
        below = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(negative, axis=1)], axis=1)
        first = np.searchsorted(sorted_scores, sorted_scores[positive], side="left")
        after = np.searchsorted(sorted_scores, sorted_scores[positive], side="right")
        mine = weights[:, order[positive]]
        won += (mine * (below[:, first] + below[:, after]) / 2).sum(axis=1)
        pairs += mine.sum(axis=1) * below[:, -1]
    return np.asarray(np.divide(won, pairs, out=np.full(len(weights), np.nan), where=pairs > 0), dtype=np.float64)


def recall_at(labels: Labels, scores: Floats, false_positives: float = FALSE_POSITIVES) -> float:
    """The share of positives above the lowest threshold that lets no more than this share of the negatives through.

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
    """Probabilities in bins of equal width, held against what came true."""
    place = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    found = tuple(
        Bin(int(inside.sum()), float(probabilities[inside].mean()), float(labels[inside].mean()))
        for inside in (place == number for number in range(bins))
        if inside.any()
    )
    error = sum(b.samples * abs(b.probability - b.positives) for b in found) / max(1, len(labels))
    return Calibration(float(((probabilities - labels) ** 2).mean()), float(error), found)
