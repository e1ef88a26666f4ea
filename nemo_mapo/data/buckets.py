"""Boundaries of duration buckets that fit a split, estimated as by NeMo's `estimate_duration_bins.py`."""

from itertools import pairwise
from typing import NamedTuple

from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets

from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.data.manifests import checked_entries


class BucketEstimate(NamedTuple):
    """Boundaries, and the number of clips in each bucket."""

    bins: tuple[float, ...]
    """Seconds, ascending; for `bucket_duration_bins`."""
    clips: tuple[int, ...]
    """Clips of each bucket; one more entry than `bins`."""


class _Clip(NamedTuple):
    duration: float


def estimate_bins(config: DatasetConfig, num_buckets: int) -> BucketEstimate:
    """Boundaries of buckets with about equal total duration (Lhotse's estimate), over clips within the split's limits.

    Reads manifests (and headers of tarred corpora), but no audio. There are fewer boundaries if many clips have equal
    duration.

    Raises:
        ValueError: fewer than two buckets, or fewer clips than buckets.
    """
    durations = [
        entry.duration_seconds
        for _, entries in checked_entries(config)
        for entry in entries
        if config.min_duration <= entry.duration_seconds <= config.max_duration
    ]
    if not 2 <= num_buckets <= len(durations):
        raise ValueError(
            f"{num_buckets} buckets for {len(durations)} clips between {config.min_duration} and "
            f"{config.max_duration} seconds: ask for at least 2, and no more than there are clips"
        )
    found = estimate_duration_buckets([_Clip(duration) for duration in durations], num_buckets)
    bins = tuple(sorted({float(border) for border in found}))
    edges = (0.0, *bins, float("inf"))
    clips = tuple(sum(low <= duration < high for duration in durations) for low, high in pairwise(edges))
    return BucketEstimate(bins=bins, clips=clips)
