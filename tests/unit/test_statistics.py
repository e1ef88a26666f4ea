"""Intervals and tests against values that are known: by hand, from the exact distribution, from SciPy."""

import math

import numpy as np
import pytest
from scipy import stats

from nemo_mapo.statistics import (
    bootstrap_means,
    compare_paired,
    difference_in_words,
    estimate,
    mcnemar_exact,
    paired_share_interval,
    score_interval,
)

SETTINGS = {"samples": 20000, "seed": 3, "confidence": 0.95}


def test_all_right_and_all_wrong_have_intervals_of_some_width():
    # Wilson's interval of 0 of 40 reaches to z^2 / (40 + z^2).
    assert score_interval([0.0] * 40, **SETTINGS).low == 0.0
    assert score_interval([0.0] * 40, **SETTINGS).high == pytest.approx(1.959964**2 / (40 + 1.959964**2))
    assert score_interval([1.0] * 7, **SETTINGS).high == 1.0 and score_interval([1.0] * 7, **SETTINGS).low < 0.7


def test_wilsons_interval_by_hand():
    # Half of 100: 0.5 -/+ z / (2 sqrt(100 + z^2)).
    interval = score_interval([1.0] * 50 + [0.0] * 50, **SETTINGS)
    half = 1.959964 / (2 * (100 + 1.959964**2) ** 0.5)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_ratings_have_a_bootstrap_interval():
    values = [0.2, 0.2, 0.6, 1.0, 0.0] * 8
    interval = score_interval(values, **SETTINGS)
    low, high = np.quantile(bootstrap_means(values, samples=20000, seed=3), [0.025, 0.975])
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.4, low, high))


def test_resampled_means_are_those_of_items_drawn_one_by_one():
    values = [0.2, 0.2, 0.6, 1.0, 0.0]
    generator = np.random.default_rng(0)
    slow = generator.choice(values, size=(20000, len(values))).mean(axis=1)
    fast = bootstrap_means(values, samples=20000, seed=1)
    assert fast.mean() == pytest.approx(slow.mean(), abs=0.005) and fast.std() == pytest.approx(slow.std(), abs=0.005)
    assert np.quantile(fast, [0.1, 0.5, 0.9]) == pytest.approx(np.quantile(slow, [0.1, 0.5, 0.9]), abs=0.021)


def test_the_same_seed_gives_the_same_interval():
    values = [1.0, 0.0, 0.6, 0.2]
    assert score_interval(values, **SETTINGS) == score_interval(values, **SETTINGS)
    assert score_interval(values, **SETTINGS) == score_interval(values[::-1], **SETTINGS)


def test_no_items_have_no_interval():
    with pytest.raises(ValueError, match="no items"):
        score_interval([], **SETTINGS)


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
    # Agreement on ten questions leaves z^2 / (10 + z^2) open on either side.
    bound = 1.959964**2 / (10 + 1.959964**2)
    assert comparison.p_value == 1.0
    assert (comparison.difference.low, comparison.difference.high) == pytest.approx((-bound, bound))


def test_tangos_interval_of_a_published_example():
    # Fagerland, Lydersen & Laake (2014): 1 and 7 discordant pairs of 21, difference -0.286.
    interval = paired_share_interval(1, 7, 21)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((-0.286, -0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize(("first", "second", "items"), [(40, 0, 40), (0, 40, 40), (1, 0, 1), (0, 0, 1), (3, 2, 5)])
def test_an_interval_of_a_paired_difference_is_possible_and_holds_it(first, second, items):
    interval = paired_share_interval(first, second, items)
    assert -1 <= interval.low <= interval.mean <= interval.high <= 1
    assert interval.high - interval.low > 0.1
    mirrored = paired_share_interval(second, first, items)
    assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low))


@pytest.mark.parametrize("shares", [(0.05, 0.05), (0.2, 0.05), (0.02, 0.0), (0.3, 0.3)])
def test_paired_intervals_cover_the_truth_in_about_95_percent(shares):
    generator = np.random.default_rng(0)
    counts = generator.multinomial(60, [*shares, 1 - sum(shares)], size=600)
    found = [paired_share_interval(int(first), int(second), 60) for first, second, _ in counts]
    covered = np.mean([interval.low <= shares[0] - shares[1] <= interval.high for interval in found])
    assert covered > 0.92


@pytest.mark.parametrize(
    ("values", "within", "bounds"),
    [([0.02, 0.9], "share", (0, 1)), ([-0.9, 0.95], "difference", (-1, 1)), ([10.0, 500.0], "positive", (0, math.inf))],
)
def test_intervals_over_two_seeds_stay_within_what_is_possible(values, within, bounds):
    found = estimate(values, within)
    assert bounds[0] < found.low < found.mean < found.high < bounds[1]


def test_intervals_on_a_bounded_scale_agree_with_the_t_interval_where_it_is_narrow():
    values = [0.5, 0.501, 0.499]
    bounded, plain = estimate(values, "share"), estimate(values)
    assert (bounded.low, bounded.high) == pytest.approx((plain.low, plain.high), abs=1e-5)


@pytest.mark.parametrize(
    ("values", "within"),
    [([0.0, 0.0], "share"), ([0.55, 0.55, 0.55], "share"), ([0.0, 0.0], "difference"), ([55.0, 55.0], "positive"),
     ([0.7 - 0.6, 0.8 - 0.7], "difference")],
)  # fmt: skip
def test_equal_seeds_have_no_interval_rather_than_one_of_no_width(values, within):
    found = estimate(values, within)
    assert (found.low, found.high, found.mean) == (None, None, pytest.approx(values[0]))


def test_an_interval_around_zero_says_what_is_excluded():
    assert difference_in_words(-5.06, 0.94) == (
        "not settled; excluded are a loss of more than 5.1 and a gain of more than 0.9 points"
    )
    assert difference_in_words(1.0, 3.0) == "higher, by at least 1.0 points"
    assert difference_in_words(-3.0, -1.0) == "lower, by at least 1.0 points"


def test_ratings_that_are_all_equal_have_an_interval_of_some_width():
    bound = 1.959964**2 / (20 + 1.959964**2)
    same = score_interval([0.6] * 20, **SETTINGS)
    assert (same.low, same.mean, same.high) == pytest.approx((0.6 - 0.6 * bound, 0.6, 0.6 + 0.4 * bound))
    # No difference in any rating is as much evidence as no difference in any answer.
    for values in ([0.6] * 20, [1.0] * 20):
        gap = compare_paired(values, values, **SETTINGS).difference
        assert (gap.low, gap.mean, gap.high) == pytest.approx((-bound, 0.0, bound))


def test_ratings_have_no_mcnemar_test():
    assert compare_paired([0.8, 1.0], [0.6, 1.0], **SETTINGS).mcnemar is None
