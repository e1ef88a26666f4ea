"""Means and intervals over a handful of seeds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""97.5 % quantiles of Student's t for 1..20 degrees of freedom; beyond, the last one (a little wide)."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Mean over seeds with its spread."""

    mean: float
    deviation: float | None
    """Standard deviation of a seed (n - 1); None for a single seed."""
    low: float | None
    """Lower end of the 95 % t-interval of the mean; None for a single seed."""
    high: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean, standard deviation and interval mean -/+ t(0.975, n-1) sd / sqrt(n); None without values."""
    if not values:
        return None
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Estimate(mean=mean, deviation=None, low=None, high=None, count=1)
    deviation = statistics.stdev(values)
    half = T_975[min(count - 1, len(T_975)) - 1] * deviation / math.sqrt(count)
    return Estimate(mean=mean, deviation=deviation, low=mean - half, high=mean + half, count=count)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """Estimate of value minus baseline over the seeds that both have: what the seeds share cancels."""
    return estimate([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])


def paired_ratio(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """Geometric mean of value / baseline over shared seeds, its interval taken on the logarithm.

    Seeds where either is not positive are left out; `deviation` is that of the logarithm.
    """
    shared = [seed for seed in sorted(values.keys() & baseline.keys()) if values[seed] > 0 and baseline[seed] > 0]
    found = estimate([math.log(values[seed] / baseline[seed]) for seed in shared])
    if found is None:
        return None
    return Estimate(
        mean=math.exp(found.mean),
        deviation=found.deviation,
        low=None if found.low is None else math.exp(found.low),
        high=None if found.high is None else math.exp(found.high),
        count=found.count,
    )
