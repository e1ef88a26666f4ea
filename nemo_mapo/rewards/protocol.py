"""Interface of a reward: takes completions, returns one value for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from nemo_mapo.types import Example


@dataclass(frozen=True, kw_only=True)
class RewardSample:
    """One completion to judge."""

    text: str
    """The completion without end-of-turn tokens, reasoning tags kept."""
    example: Example
    """The question, its choices and right answer, and the clips that it is about."""
    finished: bool
    """Whether the model stopped by itself; False if the length limit truncated it."""
    num_tokens: int
    """Number of token ids of the completion, including the stop token."""


@runtime_checkable
class Reward(Protocol):
    """Scores completions; a value is None if its judge model gave no verdict."""

    @property
    def name(self) -> str:
        """Name of its entry in `rewards.terms` and of its metric."""
        ...

    def __call__(self, samples: Sequence[RewardSample]) -> Sequence[float | None]:
        """Return one value per sample, in order."""
        ...
