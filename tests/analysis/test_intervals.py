"""Intervals are those of SciPy and of the definitions, cover what they say, and never have width 0."""

import math

import numpy as np
import pytest
from support.raises import raises

pytest.importorskip("scipy", reason='pip install "hookmap[eval]"')

from scipy import stats

from hookmap.analysis.intervals import auroc_interval, difference_interval, mean_interval, proportion_interval


@pytest.mark.parametrize(("successes", "total"), [(0, 1), (8, 8), (30, 30), (0, 12), (7, 10), (412, 1319)])
def test_of_a_proportion_it_is_scipys_exact_one(successes: int, total: int) -> None:
    expected = stats.binomtest(successes, total).proportion_ci(method="exact")
    assert proportion_interval(successes, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_proportion_of_nothing_may_be_any() -> None:
    assert proportion_interval(0, 0) == (0.0, 1.0)
    with raises(ValueError, "9 of 8"):
        proportion_interval(9, 8)


def test_of_a_mean_it_is_scipys_t_with_an_observation_at_each_bound() -> None:
    values = np.array([0.2, 0.9, 0.4, 0.4, 0.7])
    more = [*values, 0.0, 1.0]
    expected = stats.t.interval(0.95, len(more) - 1, np.mean(more), stats.sem(more))
    assert mean_interval(values, 0, 1) == pytest.approx(expected)
    assert difference_interval(values - 0.5) == pytest.approx(
        stats.t.interval(0.95, 6, np.mean([*(values - 0.5), -1, 1]), stats.sem([*(values - 0.5), -1, 1]))
    )
    with raises(ValueError, "between 0 and 1"):
        mean_interval([0.5, 1.2], 0, 1)


@pytest.mark.parametrize("count", [1, 3, 30])
def test_equal_values_leave_doubt(count: int) -> None:
    low, high = mean_interval(np.ones(count), 0, 1)
    assert 0 <= low < 0.95 and high == 1
    low, high = difference_interval(np.zeros(count))
    assert low < 0 < high


@pytest.mark.parametrize("auroc", [0.0, 0.3, 0.5, 0.87, 1.0])
def test_the_bounds_of_an_auroc_are_as_unlikely_as_they_say(auroc: float) -> None:
    """At a bound t, auroc is 1.96 of the standard deviations that t would have away: written out as Newcombe does."""
    m, n, inflation = 14, 9, 2.25
    low, high = auroc_interval(auroc, m, n, inflation)
    assert low < high and low <= auroc <= high
    for t in {low, high} - {0.0, 1.0}:
        star = (m + n) / 2 - 1
        variance = t * (1 - t) * (1 + star * (1 - t) / (2 - t) + star * t / (1 + t)) / (m * n)
        assert abs(t - auroc) == pytest.approx(stats.norm.ppf(0.975) * math.sqrt(inflation * variance), abs=1e-9)


def test_an_auroc_of_chance_has_the_variance_of_the_rank_test() -> None:
    """Mann and Whitney's (m + n + 1) / 12mn at 0.5."""
    low, high = auroc_interval(0.5, 500, 500)
    assert (high - low) / 2 / stats.norm.ppf(0.975) == pytest.approx(math.sqrt(1001 / (12 * 500 * 500)), rel=0.01)


def test_impossible_aurocs_are_refused() -> None:
    for wrong in ((1.2, 5, 5), (0.5, 0, 5), (math.nan, 5, 5)):
        with raises(ValueError, "expected an AUROC"):
            auroc_interval(*wrong)


@pytest.mark.parametrize("count", [5, 10, 30])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
def test_coverage_of_means_of_few_right_and_wrong(count: int, share: float) -> None:
    """Exactly: over all outcomes of `count` questions, weighted with their probability. The bootstrap covers 43 to
    68 % of these at 5 to 10 questions and a share of 0.9 or more."""
    outcomes = np.arange(count + 1)
    chance = stats.binom.pmf(outcomes, count, share)
    for interval in (
        lambda k: mean_interval(np.arange(count) < k, 0, 1),
        lambda k: proportion_interval(int(k), count),
    ):
        held = [low <= share <= high for low, high in map(interval, outcomes)]
        assert chance[held].sum() > 0.935
