"""How certain a score is, and whether two runs differ: intervals over questions and over seeds, exact tests.

No interval leaves the range of possible values, and none has zero width just because a few answers do not vary.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over items with its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Exact McNemar test: of the items that exactly one run gets right, does each run get half?"""

    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Two runs over the same items, first minus second."""

    difference: Interval
    p_value: float
    """Two-sided: McNemar's if all scores are 0 or 1, otherwise the bootstrap's."""
    mcnemar: McNemar | None
    """None if some scores are ratings."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Mean over seeds with its spread."""

    mean: float
    deviation: float | None
    """Standard deviation over seeds (n - 1); None for a single seed."""
    low: float | None
    """Lower end of the 95 % t-interval of the mean; None for a single seed, or if all seeds have the same value."""
    high: float | None
    count: int

    def times(self, factor: float) -> "Estimate":
        """The estimate in another unit."""
        ends = [None if end is None else factor * end for end in (self.deviation, self.low, self.high)]
        return replace(self, mean=factor * self.mean, deviation=ends[0], low=ends[1], high=ends[2])


Range = Literal["share", "difference", "positive", "real"]
"""What values can be: 0..1, -1..1, above 0, anything."""

_Curve = Callable[[float], float]
_SCALES: Mapping[Range, tuple[_Curve, _Curve, _Curve]] = {
    "share": (special.logit, special.expit, lambda value: 1 / (value * (1 - value))),
    "difference": (math.atanh, math.tanh, lambda value: 1 / (1 - value**2)),
    "positive": (math.log, math.exp, lambda value: 1 / value),
    "real": (float, float, lambda value: 1.0),
}
"""Scale on which the interval is symmetric, its inverse and its slope."""
_SAME = 1e-9
"""Seeds whose deviation is smaller differ by rounding only."""


def score_interval(values: Sequence[float], *, samples: int, seed: int, confidence: float = CONFIDENCE) -> Interval:
    """The mean of `values`, each 0 to 1, with its confidence interval over items.

    Right and wrong answers (0 or 1) get Wilson's score interval, whose width is above 0 even at 0 % and 100 %; ratings
    get the percentile bootstrap, and Wilson's distance to the ends of the range if they are all equal.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("there are no items to draw from")
    if not _binary(values):
        return _bootstrap_interval(values, lowest=0.0, samples=samples, seed=seed, confidence=confidence)
    return share_interval(int(sum(values)), len(values), confidence=confidence)


def share_interval(successes: int, trials: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a share."""
    found = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Interval(mean=successes / trials, low=float(found.low), high=float(found.high))


def bootstrap_means(values: Sequence[float], *, samples: int, seed: int) -> NDArray[np.float64]:
    """Means of `samples` item sets, each of the size of `values` and drawn from it with replacement.

    How often each distinct value is drawn is multinomial, so the items need not be drawn one by one.
    """
    levels, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=samples)
    means: NDArray[np.float64] = drawn @ levels / len(values)
    return means


def mcnemar_exact(first: Sequence[float], second: Sequence[float]) -> McNemar:
    """Two-sided binomial test of b against c, the items that only the first or only the second run gets right."""
    pairs = list(zip(first, second, strict=True))
    assert _binary([*first, *second]), "McNemar's test needs scores of 0 or 1"
    only_first, only_second = pairs.count((1, 0)), pairs.count((0, 1))
    differing = only_first + only_second
    p_value = float(stats.binomtest(only_first, differing).pvalue) if differing else 1.0
    return McNemar(only_first=only_first, only_second=only_second, p_value=p_value)


def paired_share_interval(only_first: int, only_second: int, items: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Tango's score interval of a difference of two shares over the same items, first minus second.

    The ends are the differences d at which the score statistic (b - c - n d) / sqrt(n (2 q + d (1 - d))) reaches the
    normal quantile, q being the likeliest share of c-items given d (Tango, Statistics in Medicine 17, 1998). Within
    -1..1; of width 2 z^2 / (n + z^2) if the runs agree on every item.
    """
    quantile = float(stats.norm.ppf((1 + confidence) / 2))

    def score(difference: float) -> float:
        linear = (2 * items - only_first + only_second) * difference - only_first - only_second
        constant = -only_second * difference * (1 - difference)
        share = (math.sqrt(max(0.0, linear**2 - 8 * items * constant)) - linear) / (4 * items)
        variance = items * (2 * share + difference * (1 - difference))
        distance = only_first - only_second - items * difference
        if variance > 0:
            return distance / math.sqrt(variance)
        return math.copysign(math.inf, distance) if distance else 0.0

    def end(sign: int) -> float:
        # The score falls from above +z at -1 to below -z at 1; at the borders it may be infinite.
        border = 1 - 1e-12
        if abs(score(-sign * border)) <= quantile:
            return float(-sign)
        return float(optimize.bisect(lambda d: max(-1e9, min(1e9, score(d))) - sign * quantile, -border, border))

    mean = (only_first - only_second) / items
    return Interval(mean=mean, low=min(mean, end(+1)), high=max(mean, end(-1)))


def compare_paired(
    first: Sequence[float], second: Sequence[float], *, samples: int, seed: int, confidence: float = CONFIDENCE
) -> PairedComparison:
    """Compare two runs' scores of the same items, in the same order.

    Right and wrong answers get Tango's interval and McNemar's test. Ratings get the bootstrap, which draws items, both
    scores together: p = 2 min(P(d* <= 0), P(d* >= 0)), each probability counted with one more sample at no difference,
    so it is never 0.
    """
    if _binary([*first, *second]):
        test = mcnemar_exact(first, second)
        gap = paired_share_interval(test.only_first, test.only_second, len(first), confidence=confidence)
        return PairedComparison(difference=gap, p_value=test.p_value, mcnemar=test)
    differences = [one - other for one, other in zip(first, second, strict=True)]
    means = bootstrap_means(differences, samples=samples, seed=seed)
    below, above = int((means <= 0).sum()), int((means >= 0).sum())
    return PairedComparison(
        difference=_bootstrap_interval(differences, lowest=-1.0, samples=samples, seed=seed, confidence=confidence),
        p_value=min(1.0, 2 * (min(below, above) + 1) / (samples + 1)),
        mcnemar=None,
    )


def estimate(values: Sequence[float], within: Range = "real") -> Estimate | None:
    """Mean, standard deviation and 95 % t-interval over seeds; None without values.

    The interval is symmetric on a scale that respects the range (log-odds of shares, inverse hyperbolic tangent of
    differences of shares, logarithm of positive values), by the delta method, so its ends are possible values. Equal
    values have no interval: a width of 0 would claim that another seed cannot differ.
    """
    if not values:
        return None
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Estimate(mean=mean, deviation=None, low=None, high=None, count=1)
    deviation = statistics.stdev(values)
    if deviation <= _SAME * max(1.0, abs(mean)):
        return Estimate(mean=mean, deviation=deviation, low=None, high=None, count=count)
    scale, back, slope = _SCALES[within]
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count) * slope(mean)
    low, high = (float(back(scale(mean) + shift)) for shift in (-half, half))
    return Estimate(mean=mean, deviation=deviation, low=low, high=high, count=count)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], within: Range = "real"
) -> Estimate | None:
    """Estimate of value minus baseline over the seeds that both have: what the seeds share cancels."""
    return estimate([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())], within)


def paired_ratio(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """Geometric mean of value / baseline over shared seeds, its interval taken on the logarithm.

    Seeds for which either is not positive are left out; `deviation` is that of the logarithm.
    """
    shared = [seed for seed in sorted(values.keys() & baseline.keys()) if values[seed] > 0 and baseline[seed] > 0]
    found = estimate([math.log(values[seed] / baseline[seed]) for seed in shared])
    if found is None:
        return None
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return replace(found, mean=math.exp(found.mean), low=low, high=high)


def difference_in_words(low: float, high: float) -> str:
    """Say in words what an interval of a difference, in points, settles and what it leaves open."""
    if low > 0:
        return f"higher, by at least {low:.1f} points"
    if high < 0:
        return f"lower, by at least {-high:.1f} points"
    return f"not settled; excluded are a loss of more than {-low:.1f} and a gain of more than {high:.1f} points"


def _binary(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def _bootstrap_interval(
    values: Sequence[float], *, lowest: float, samples: int, seed: int, confidence: float
) -> Interval:
    """The percentile bootstrap of values between `lowest` and 1.

    Equal values would give it no width. Wilson's interval of 0 of n says which share of items may still differ; they do
    so by at most the distance to the end of the range. For 0 and 1 that is Wilson's interval, for a difference of 0
    Tango's.
    """
    if max(values) - min(values) <= _SAME:
        mean, share = values[0], share_interval(0, len(values), confidence=confidence).high
        return Interval(mean=mean, low=mean - share * (mean - lowest), high=mean + share * (1 - mean))
    means = bootstrap_means(values, samples=samples, seed=seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail]).tolist()
    return Interval(mean=math.fsum(values) / len(values), low=low, high=high)
