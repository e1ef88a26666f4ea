"""How sure a score is, and whether two runs differ: bootstrap over items, exact McNemar test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over items with its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Exact McNemar test: of the items that exactly one run has right, does each run have half?"""

    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Two runs over the same items, first minus second."""

    difference: Interval
    p_value: float
    """Two-sided bootstrap probability of no difference."""
    mcnemar: McNemar | None
    """None where scores are not all 0 or 1."""


def bootstrap_means(values: Sequence[float], *, samples: int, seed: int) -> NDArray[np.float64]:
    """Means of `samples` item sets, each drawn from `values` with replacement and as large as it.

    How often each distinct value is drawn is multinomial, so the items need not be drawn one by one.
    """
    if not values:
        raise ValueError("there are no items to draw from")
    levels, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=samples)
    means: NDArray[np.float64] = drawn @ levels / len(values)
    return means


def bootstrap_interval(values: Sequence[float], *, samples: int, seed: int, confidence: float) -> Interval:
    """The mean of `values` with its percentile bootstrap interval over items."""
    means = bootstrap_means(values, samples=samples, seed=seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail]).tolist()
    return Interval(mean=math.fsum(values) / len(values), low=low, high=high)


def mcnemar_exact(first: Sequence[float], second: Sequence[float]) -> McNemar:
    """p = min(1, 2 P(X <= min(b, c))), X ~ Binomial(b + c, 1/2); b and c count items that only one run has right."""
    pairs = list(zip(first, second, strict=True))
    assert all(value in (0, 1) for pair in pairs for value in pair), "McNemar's test is about right and wrong"
    only_first, only_second = pairs.count((1, 0)), pairs.count((0, 1))
    total = only_first + only_second
    tail = sum(math.comb(total, count) for count in range(min(only_first, only_second) + 1))
    p_value = float(min(Fraction(1), Fraction(2 * tail, 2**total)))
    return McNemar(only_first=only_first, only_second=only_second, p_value=p_value)


def compare_paired(
    first: Sequence[float], second: Sequence[float], *, samples: int, seed: int, confidence: float
) -> PairedComparison:
    """Compare two runs' scores of the same items, in the same order.

    The bootstrap draws items, both scores together. p = 2 min(P(d* <= 0), P(d* >= 0)), each probability counted with
    one more sample at no difference, so it is never 0.
    """
    differences = [one - other for one, other in zip(first, second, strict=True)]
    means = bootstrap_means(differences, samples=samples, seed=seed)
    below, above = int((means <= 0).sum()), int((means >= 0).sum())
    binary = all(value in (0, 1) for value in (*first, *second))
    return PairedComparison(
        difference=bootstrap_interval(differences, samples=samples, seed=seed, confidence=confidence),
        p_value=min(1.0, 2 * (min(below, above) + 1) / (samples + 1)),
        mcnemar=mcnemar_exact(first, second) if binary else None,
    )
