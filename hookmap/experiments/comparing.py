"""Paired tests over questions. Pure: arrays in, numbers out.

The same questions are asked after both prefixes, so that how hard a question is falls out of the difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hookmap.probes.metrics import Floats

RESAMPLES = 10_000
_AT_ONCE = 1_000_000
"""numbers of one matrix of resampled questions, 8 MB"""
_EXACT = 16
"""questions that differ, up to which all signs are gone through"""


@dataclass(frozen=True)
class Difference:
    """A number after one prefix minus the same after another, over questions."""

    mean: float
    low: float
    """95 % percentile bootstrap, questions drawn with replacement"""
    high: float
    p: float
    """two-sided, of the hypothesis that the sign of each question's difference is a coin's"""
    test: str
    better: int
    """questions on which the first is higher"""
    worse: int


def compare(one: Floats, other: Floats, seed: int = 0) -> Difference:
    """one, other: [questions], means over the answers to each. Raises ValueError where they do not pair."""
    if one.shape != other.shape or one.ndim != 1 or not len(one):
        raise ValueError(f"expected two arrays [questions], got {one.shape} and {other.shape}")
    apart = np.where(np.isclose(one, other, rtol=1e-9, atol=1e-12), 0.0, one - other)  # sums in another order are equal
    low, high = interval(apart, seed)
    p, test = sign_test(apart, seed)
    return Difference(float(apart.mean()), low, high, p, test, int((apart > 0).sum()), int((apart < 0).sum()))


def interval(values: Floats, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean of [questions]."""
    draw = np.random.default_rng(seed)
    means, step = [], max(1, _AT_ONCE // len(values))
    for start in range(0, RESAMPLES, step):
        means.append(values[draw.integers(0, len(values), (min(step, RESAMPLES - start), len(values)))].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def sign_test(apart: Floats, seed: int = 0) -> tuple[float, str]:
    """Two-sided p of the mean of [questions] when signs are flipped, and the test's name.

    Where all differences are of one size, as those of right and wrong, this is McNemar's exact test; else all flips
    up to 16 questions that differ, or 10,000 drawn ones, the observed one among them (Phipson & Smyth 2010).
    """
    from scipy.stats import binomtest

    moved = apart[apart != 0]
    if not len(moved):
        return 1.0, "no question differs"
    if np.allclose(np.abs(moved), np.abs(moved[0])):
        return float(binomtest(int((moved > 0).sum()), len(moved)).pvalue), "McNemar, exact"
    found = abs(moved.sum())
    if len(moved) <= _EXACT:
        signs = 1 - 2 * ((np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))) & 1)
        return float((np.abs(signs @ moved) >= found - 1e-12).mean()), "sign flips, all"
    draw = np.random.default_rng(seed)
    signs = draw.integers(0, 2, (RESAMPLES, len(moved)), dtype=np.int8) * 2 - 1
    return float(((np.abs(signs @ moved) >= found - 1e-12).sum() + 1) / (RESAMPLES + 1)), "sign flips, 10,000 drawn"


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given (Holm 1979): all below 0.05 together hold a false one in 5 % of families."""
    order = np.argsort(p_values, kind="stable")
    found, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, p_values[place] * (len(p_values) - rank)))
        found[place] = highest
    return found
