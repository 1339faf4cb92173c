"""95 % intervals that are valid for small samples and never have width 0. Pure: numbers in, (low, high) out.

Their coverage is simulated in docs/coverage.md. SciPy comes with `hookmap[eval]`, and is imported when used.
"""

import math
from functools import cache
from typing import Any

import numpy as np

from hookmap.errors import HookmapError
from hookmap.extras import needed

LEVEL = 0.95
Interval = tuple[float, float]


def proportion_interval(successes: int, total: int, level: float = LEVEL) -> Interval:
    """Clopper and Pearson's exact interval of a proportion, such as an accuracy; (0, 1) for no trials.

    8 of 8 give (0.631, 1). It covers every proportion with at least `level`. Raises ValueError for impossible counts.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"expected 0 <= successes <= total, got {successes} of {total}")
    beta, tail = _stats().beta, (1 - level) / 2
    low = float(beta.ppf(tail, successes, total - successes + 1)) if successes else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, total - successes)) if successes < total else 1.0
    return low, high


def mean_interval(values: Any, least: float, most: float, level: float = LEVEL) -> Interval:
    """Interval of the mean of independent numbers that lie between `least` and `most`, such as rewards of questions.

    Student's t after two more observations, one at each bound: thirty equal values do not show that no other ever
    comes. Of 0 and 1 it is Agresti and Coull's idea; of differences between -1 and 1, Bonett and Price's (2012).
    values: [n]. Raises ValueError for a value outside the bounds.
    """
    given = np.asarray(values, dtype=np.float64).ravel()
    slack = 1e-9 * (most - least)
    if not least < most or not ((given >= least - slack) & (given <= most + slack)).all():
        raise ValueError(f"expected values between {least} and {most}, got {given.min()} to {given.max()}")
    more = np.concatenate([given, [least, most]])
    half = _student((1 + level) / 2, len(more) - 1) * float(more.std(ddof=1)) / math.sqrt(len(more))
    return max(least, float(more.mean() - half)), min(most, float(more.mean() + half))


def difference_interval(differences: Any, span: float = 1.0, level: float = LEVEL) -> Interval:
    """Interval of the mean of paired differences, [n], each between -span and span. See `mean_interval`."""
    return mean_interval(differences, -span, span, level)


def auroc_interval(
    auroc: float, positives: float, negatives: float, inflation: float = 1.0, level: float = LEVEL
) -> Interval:
    """Newcombe's score interval of an AUROC (2006, his method 5): those whose own variance makes `auroc` likely.

    positives, negatives: independent ones, so questions, not samples of them. inflation: of the variance, above 1
    where scores share training data. Raises ValueError for an AUROC outside 0 to 1, or fewer than one of either kind.
    """
    if not 0 <= auroc <= 1 or positives < 1 or negatives < 1:
        raise ValueError(f"expected an AUROC of 1 and 1 at least, got {auroc} of {positives} and {negatives}")
    z = float(_stats().norm.ppf((1 + level) / 2))

    def low(centre: float) -> float:
        inside, outside = centre, 0.0  # bisected: 60 halvings are beyond the last bit
        for _ in range(60):
            middle = (inside + outside) / 2
            near = centre - middle <= z * math.sqrt(inflation * _auroc_variance(middle, positives, negatives))
            inside, outside = (middle, outside) if near else (inside, middle)
        return outside

    return low(auroc), 1 - low(1 - auroc)


def _auroc_variance(auroc: float, positives: float, negatives: float) -> float:
    """Hanley and McNeil's, with the mean of both counts in the place of each."""
    others = (positives + negatives) / 2 - 1
    spread = 1 + others * ((1 - auroc) / (2 - auroc) + auroc / (1 + auroc))
    return auroc * (1 - auroc) * spread / (positives * negatives)


@cache
def _student(share: float, freedom: int) -> float:
    """A quantile of Student's t. Cached, because it is slow and reports ask for the same ones again."""
    return float(_stats().t.ppf(share, freedom))


def _stats() -> Any:
    return needed("scipy.stats", 'intervals need SciPy: pip install "hookmap[eval]"', HookmapError)
