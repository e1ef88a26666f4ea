"""Intervals and tests against values that are known: by hand, from the exact distribution, from SciPy."""

import numpy as np
import pytest
from scipy import stats

from nemo_mapo.evaluation.benchmarks.statistics import (
    bootstrap_interval,
    bootstrap_means,
    compare_paired,
    mcnemar_exact,
)

SETTINGS = {"samples": 20000, "seed": 3, "confidence": 0.95}


def test_the_interval_of_a_certain_score_has_no_width():
    interval = bootstrap_interval([1.0] * 7, **SETTINGS)
    assert (interval.mean, interval.low, interval.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("right", "items"), [(50, 100), (20, 100), (360, 400)])
def test_the_interval_of_right_and_wrong_answers_is_that_of_the_binomial_distribution(right, items):
    # The number of right answers in a resampled set is exactly Binomial(items, right / items).
    low, high = stats.binom.ppf([0.025, 0.975], items, right / items) / items
    interval = bootstrap_interval([1.0] * right + [0.0] * (items - right), **SETTINGS)
    assert interval.mean == right / items
    # The quantile of a discrete distribution may fall on either side of a step.
    assert interval.low == pytest.approx(low, abs=1 / items) and interval.high == pytest.approx(high, abs=1 / items)


def test_resampled_means_are_those_of_items_drawn_one_by_one():
    values = [0.2, 0.2, 0.6, 1.0, 0.0]
    generator = np.random.default_rng(0)
    slow = generator.choice(values, size=(20000, len(values))).mean(axis=1)
    fast = bootstrap_means(values, samples=20000, seed=1)
    assert fast.mean() == pytest.approx(slow.mean(), abs=0.005) and fast.std() == pytest.approx(slow.std(), abs=0.005)
    assert np.quantile(fast, [0.1, 0.5, 0.9]) == pytest.approx(np.quantile(slow, [0.1, 0.5, 0.9]), abs=0.021)


def test_the_same_seed_gives_the_same_interval():
    values = [1.0, 0.0, 0.6, 0.2]
    assert bootstrap_interval(values, **SETTINGS) == bootstrap_interval(values, **SETTINGS)
    assert bootstrap_interval(values, **SETTINGS) == bootstrap_interval(values[::-1], **SETTINGS)


def test_no_items_have_no_interval():
    with pytest.raises(ValueError, match="no items"):
        bootstrap_interval([], **SETTINGS)


def scores(only_first, only_second, both, neither):
    first = [1.0] * only_first + [0.0] * only_second + [1.0] * both + [0.0] * neither
    second = [0.0] * only_first + [1.0] * only_second + [1.0] * both + [0.0] * neither
    return first, second


def test_mcnemar_by_hand():
    # 3 against 1: p = 2 (C(4,0) + C(4,1)) / 2^4 = 10 / 16.
    test = mcnemar_exact(*scores(3, 1, 10, 2))
    assert (test.only_first, test.only_second, test.p_value) == (3, 1, 10 / 16)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 5), (1, 9), (30, 12), (700, 800)])
def test_mcnemar_is_the_exact_binomial_test(first, second):
    test = mcnemar_exact(*scores(first, second, 17, 4))
    expected = stats.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert test.p_value == pytest.approx(expected, rel=1e-9)


def test_a_paired_comparison_of_two_runs():
    comparison = compare_paired(*scores(30, 10, 40, 20), **SETTINGS)
    assert comparison.difference.mean == pytest.approx(0.2)
    # The variance of a difference of +1, -1 and 0: (0.4 - 0.2^2) / 100.
    assert comparison.difference.high - comparison.difference.low == pytest.approx(2 * 1.96 * 0.06, abs=0.02)
    assert comparison.mcnemar is not None and comparison.p_value < 0.01
    swapped = compare_paired(*reversed(scores(30, 10, 40, 20)), **SETTINGS)
    assert swapped.difference.mean == pytest.approx(-0.2)


def test_runs_that_do_not_differ_have_p_one():
    comparison = compare_paired(*scores(0, 0, 5, 5), **SETTINGS)
    assert comparison.p_value == 1.0 and comparison.difference.low == comparison.difference.high == 0.0


def test_ratings_have_no_mcnemar_test():
    assert compare_paired([0.8, 1.0], [0.6, 1.0], **SETTINGS).mcnemar is None
