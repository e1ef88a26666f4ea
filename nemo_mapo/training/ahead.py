"""A rollout batch that is generated while the one before it is trained on."""

from dataclasses import dataclass
from typing import Any

from nemo_mapo.rollout.protocol import PendingCompletions
from nemo_mapo.rows import Problem


@dataclass(frozen=True, kw_only=True)
class RolloutsAhead:
    """Completions on their way, and where the training data stood before their prompts were drawn.

    A checkpoint that is written meanwhile keeps that position: the resumed run draws the same prompts and seeds again.
    """

    pending: PendingCompletions
    problems: list[Problem]
    prompts: dict[str, Any]
    """State of the prompt stream before."""
    epoch: int
    """Of the prompt stream before."""
    figures: dict[str, float]
    """Of the prompt stream after."""
