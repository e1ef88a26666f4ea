"""Types of single rows, passed between packages: 1-D tensors on the CPU, without padding.

    problem = Problem(prompt=Prompt(id="dog-1", token_ids=torch.tensor([5, 9, 9, 7]), clips=(waveform,)), example=...)
    completions = backend.generate([problem.prompt], sampling, group_size=8, seeds=seeds)[0]
    group = problem.answered(completions)
    rows = training_rows([group])  # what the policy reads, completion after completion

Only the model's door, `nemo_mapo.models.layout`, and the engines batch them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemo_mapo.types import Example, Remembered


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """What an engine reads, ready to be completed: `Prompt(id="dog-1", token_ids=torch.tensor([5, 9, 9, 7]))`.

    Rows of one group share one `Prompt`, and with it the work of reading it. Prompts about the same clip hold the same
    tensor object, which is encoded once.
    """

    id: str
    """The question's id, for messages."""
    token_ids: Int[Tensor, " time"]
    """int64; each clip stands as a run of placeholder ids."""
    clips: tuple[Float[Tensor, "_"], ...] = ()
    """Mono waveforms, float32, in the order of their placeholders."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def is_same(self, other: "Prompt") -> bool:
        """Whether a model reads the same: equal tokens, and the same clips."""
        if self is other:
            return True
        heard, others = list(map(id, self.clips)), list(map(id, other.clips))
        return heard == others and torch.equal(self.token_ids, other.token_ids)

    def silenced(self) -> "Prompt":
        """Every clip replaced by silence of its length."""
        return replace(self, clips=tuple(torch.zeros_like(clip) for clip in self.clips))

    def unheard(self) -> "Prompt":
        """The same tokens with no clip behind their placeholders."""
        return replace(self, clips=())


@dataclass(frozen=True, kw_only=True, eq=False)
class Completion:
    """What an engine sampled for one prompt; `len(completion)` counts its tokens, including the stop token."""

    token_ids: Int[Tensor, " time"]
    """int64; the stop token is the last, if one was sampled."""
    sampling_log_probs: Float[Tensor, " time"]
    """log-probability under the distribution sampled from (temperature, top-k, top-p, ...), nats."""
    log_probs: Float[Tensor, " time"] | None
    """log pi of each token under the unmodified model (temperature 1), nats. None if the engine returns only those of
    the distribution sampled from."""
    stopped: bool
    """Whether a stop token ended it; otherwise the length limit truncated it."""
    text: str
    """Decoded without special end-of-turn tokens; reasoning tags are kept."""
    weight_version: int
    """Version of the weights that it was sampled from."""

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A question from the data and the prompt that asks it: `Problem(prompt=prompt, example=example)`."""

    prompt: Prompt
    example: Example
    """For rewards and reports; no engine sees it."""

    def answered(self, completions: Sequence[Completion]) -> "Group":
        """The group of these completions."""
        return Group(prompt=self.prompt, example=self.example, completions=tuple(completions))


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """The completions of one prompt: what rewards judge and advantages are centred over.

    groups = [problem.answered(drawn) for problem, drawn in zip(problems, generated, strict=True)]
    """

    prompt: Prompt
    example: Example
    completions: tuple[Completion, ...]

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A prompt with a completion for the policy to score: `Row(prompt=prompt, token_ids=target)`."""

    prompt: Prompt
    token_ids: Int[Tensor, " time"]
    """Token ids of the completion, int64; t = 0 is y_1."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.token_ids)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredRow(Row, Remembered):
    """A row with everything that an optimiser step needs to know of it besides what the policy says now."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSignals:
    """What one pass of a model says of each token of a completion, read at the position that predicts it."""

    log_probs: Float[Tensor, " time"]
    """log pi(y_t), nats."""
    entropy_nats: Float[Tensor, " time"]
    """H(pi)."""
    audio_mass: Float[Tensor, " time"] | None = None
    """a_t; None if it was not asked for."""
    drawn_log_probs: Float[Tensor, " time"] | None = None
    """log mu under the distribution that an engine draws from; None if it was not asked for."""

    def detached(self) -> "TokenSignals":
        """The same without gradient."""
        found: dict[str, Any] = {name: value if value is None else value.detach() for name, value in vars(self).items()}
        return TokenSignals(**found)


def training_rows(groups: Sequence[Group]) -> list[Row]:
    """One row per completion, group after group."""
    return [Row(prompt=group.prompt, token_ids=one.token_ids) for group in groups for one in group.completions]


def completions_of(groups: Sequence[Group]) -> list[Completion]:
    """All completions, group after group."""
    return [one for group in groups for one in group.completions]
