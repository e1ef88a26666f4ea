"""Does longer reasoning lower accuracy, or do hard questions get longer answers? (CAFE reports it as decay.)"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

BINS = 5


@dataclass(frozen=True, kw_only=True)
class LengthBin:
    """Completions of similar length."""

    shortest: int
    longest: int
    completions: int
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class LengthEffect:
    """Accuracy against completion length; a correlation is None if it is undefined because nothing varies."""

    pearson: float | None
    """Over all completions: confounded with difficulty."""
    within_item: float | None
    """With each question's means subtracted from its lengths and scores, which removes the effect of difficulty."""
    within_item_finished: float | None
    """The same among finished completions: one truncated at the limit is long and wrong by construction."""
    truncated: int
    """Completions truncated at the limit."""
    bins: tuple[LengthBin, ...]


def length_effect(
    lengths: Sequence[Sequence[int]], correct: Sequence[Sequence[float]], finished: Sequence[Sequence[bool]]
) -> LengthEffect:
    """Correlate length and correctness; sequences are over questions, inner ones over a question's completions."""
    length = [np.asarray(row, dtype=np.float64) for row in lengths]
    score = [np.asarray(row, dtype=np.float64) for row in correct]
    ended = [np.asarray(row, dtype=np.bool_) for row in finished]
    all_lengths, all_scores = np.concatenate(length), np.concatenate(score)
    return LengthEffect(
        pearson=_pearson(all_lengths, all_scores),
        within_item=_within_items(length, score),
        within_item_finished=_within_items(
            [row[kept] for row, kept in zip(length, ended, strict=True)],
            [row[kept] for row, kept in zip(score, ended, strict=True)],
        ),
        truncated=int(sum((~row).sum() for row in ended)),
        bins=_bins(all_lengths, all_scores),
    )


def _within_items(
    lengths: Sequence[Float[NDArray[np.float64], " _"]], scores: Sequence[Float[NDArray[np.float64], " _"]]
) -> float | None:
    """Correlation of both after subtracting each question's mean."""
    centred = [np.concatenate([row - row.mean() for row in rows if len(row)] or [[]]) for rows in (lengths, scores)]
    return _pearson(*centred) if len(centred[0]) else None


def _pearson(first: Float[NDArray[np.float64], " n"], second: Float[NDArray[np.float64], " n"]) -> float | None:
    if len(first) < 2 or any(np.allclose(values, values[0]) for values in (first, second)):
        return None
    return float(stats.pearsonr(first, second).statistic)


def _bins(lengths: Float[NDArray[np.float64], " n"], scores: Float[NDArray[np.float64], " n"]) -> tuple[LengthBin, ...]:
    """Bins by length with about equal numbers of completions; those of equal length share a bin."""
    borders = np.unique(np.quantile(lengths, np.linspace(0, 1, BINS + 1)[1:-1], method="lower"))
    number = np.searchsorted(borders, lengths, side="left")
    return tuple(
        LengthBin(
            shortest=int(lengths[part].min()),
            longest=int(lengths[part].max()),
            completions=len(part),
            accuracy=float(scores[part].mean()),
        )
        for part in (np.flatnonzero(number == bin_number) for bin_number in range(len(borders) + 1))
        if len(part)
    )
