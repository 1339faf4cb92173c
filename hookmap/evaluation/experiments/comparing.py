"""Paired tests over questions. Pure functions of arrays.

The same questions are asked after both prefixes, so that their difficulty cancels in the difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hookmap.analysis.intervals import LEVEL, difference_interval, mean_interval, proportion_interval
from hookmap.analysis.probes.metrics import Floats

RESAMPLES = 10_000
_EXACT = 16
"""the test is exact up to this many questions that differ"""


@dataclass(frozen=True)
class Difference:
    """A quantity after one prefix minus the same after another, over questions: fields of `report.Comparison`."""

    difference: float
    """its mean over questions"""
    low: float
    """95 % interval of the mean over questions; nan for a single question"""
    high: float
    p: float
    """two-sided; under the null hypothesis the sign of each question's difference is a fair coin"""
    test: str
    better: int
    """questions on which the first is higher"""
    worse: int


def compare(one: Floats, other: Floats, seed: int = 0, span: float | None = None) -> Difference:
    """one, other: [questions], means over the answers to each. Raises ValueError where they do not pair.

    span: how much two numbers may differ at most; None where there is no bound, and Student's t alone is the interval.
    """
    if one.shape != other.shape or one.ndim != 1 or not len(one):
        raise ValueError(f"expected two arrays [questions], got {one.shape} and {other.shape}")
    apart = np.where(np.isclose(one, other, rtol=1e-9, atol=1e-12), 0.0, one - other)  # sums in another order are equal
    low, high = _student(apart) if span is None else difference_interval(apart, span)
    p, test = sign_test(apart, seed)
    return Difference(float(apart.mean()), low, high, p, test, int((apart > 0).sum()), int((apart < 0).sum()))


def interval(values: Floats, least: float, most: float) -> tuple[float, float]:
    """95 % interval of the mean of [questions] that lie between least and most: exact where each is 0 or 1."""
    if least == most:  # nothing can vary
        return least, most
    if (least, most) == (0.0, 1.0) and np.isin(values, (0.0, 1.0)).all():
        return proportion_interval(int(values.sum()), len(values))
    return mean_interval(values, least, most)


def _student(apart: Floats) -> tuple[float, float]:
    from scipy.stats import t

    if len(apart) < 2:
        return float("nan"), float("nan")
    half = t.ppf((1 + LEVEL) / 2, len(apart) - 1) * apart.std(ddof=1) / len(apart) ** 0.5
    return float(apart.mean() - half), float(apart.mean() + half)


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
