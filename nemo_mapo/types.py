"""Types passed between the packages of nemo-mapo: every arrow in a diagram of a training step is one of these."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Where a question's clip comes from: `Clip(path="dog.wav", start_seconds=0.0, duration_seconds=2.0)`."""

    path: str | None
    """Audio file; None if it is in an archive."""
    start_seconds: float
    """Offset in that file."""
    duration_seconds: float


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question about one audio clip, as the manifest states it."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: str
    """The correct choice, one of `choices`; without choices (supervised training only) the expected text."""
    task: str
    reasoning: str | None = None
    """Reference reasoning, or a whole completion; the target of supervised training."""
    caption: str | None = None
    """What can be heard in the clip; needed by some optional rewards and metrics."""
    clips: tuple[Clip, ...] = ()
    """The clips in their order; empty if the question was read without its audio."""


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The text of every prompt besides its question: `Wording(instruction="Answer with one word.")`."""

    system: str | None = None
    """System message; None leaves it to the chat template."""
    instruction: str | None = None
    """Follows the question and its choices; None adds nothing."""


@dataclass(frozen=True, kw_only=True)
class AudioBatch:
    """Waveforms of the distinct audio clips of a batch.

    A batch without audio has zero rows.
    """

    waveforms: Float[Tensor, "audio samples"]
    """Mono, float32, zero-padded on the right."""
    lengths: Int[Tensor, " audio"]
    """Valid samples of each row (int64)."""

    def to(self, device: torch.device) -> "AudioBatch":
        """Copy to `device`."""
        return AudioBatch(waveforms=self.waveforms.to(device), lengths=self.lengths.to(device))


@dataclass(frozen=True, kw_only=True, eq=False)
class Remembered:
    """Signals that scoring computes for completions and the objective reads; each is declared here, once.

    Of a single row (`rows.ScoredRow`) or of a padded batch of them (`ObjectiveInputs`). Time indexes the tokens of the
    completion (t = 0 is y_1), each read at the position that predicts it.
    """

    old_log_probs: Float[Tensor, "*batch time"] | None
    """log pi_old(y_t), nats; None if no update lies in between, so that pi_old is the policy being trained."""
    ref_log_probs: Float[Tensor, "*batch time"]
    text_ref_entropy_nats: Float[Tensor, "*batch time"] | None
    """H(pi_textref); None is allowed only with mask = none, eta = 0 and log_grounding off."""
    pos_gate: Bool[Tensor, "*batch time"]
    advantages: Float[Tensor, "*batch"]
    accuracy_rewards: Float[Tensor, "*batch"]
    finished: Bool[Tensor, "*batch"]
    """False if the completion was truncated at the length limit (overlong)."""
    behaviour_log_probs: Float[Tensor, "*batch time"] | None = None
    """log mu(y_t) under the distribution sampled from, nats; None is allowed only without `behaviour_clip`."""
    audio_signal: Float[Tensor, "*batch time"] | None = None
    """What both masks read instead of delta h; None is allowed only with `signal` = delta_entropy."""
    text_only_log_probs: Float[Tensor, "*batch time"] | None = None
    """log pi_old(y_t) without the audio, nats; None is allowed only without VPPO's mask and PAPO's term."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ObjectiveInputs(Remembered):
    """Inputs of the MAPO loss for one micro-batch: the remembered signals, and what the policy says now."""

    response_mask: Bool[Tensor, "*batch time"]
    """True on the tokens that were generated."""
    old_log_probs: Float[Tensor, "*batch time"]
    log_probs: Float[Tensor, "*batch time"]
    """log pi_theta(y_t), differentiable."""
    entropy_nats: Float[Tensor, "*batch time"]
    """H(pi_theta), detached."""
    audio_mass: Float[Tensor, "*batch time"] | None
    """a_t, differentiable; None when nothing was captured (allowed with eta = 0 only)."""
    global_sequences: int
    """Completions in the whole optimiser step, over micro-batches and data-parallel ranks (denominator)."""
    global_tokens: int
    """Valid completion tokens in the whole optimiser step (denominator of token-mean aggregation)."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric that can be combined over micro-batches and ranks: mean = total / weight, or a maximum."""

    total: Tensor
    weight: Tensor
    reduce: Literal["mean", "max"] = "mean"


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """What a loss returns: a scalar that autograd follows, and detached metrics."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Metric]


class Maximum(float):
    """A metric value that is combined by its maximum; any other float is averaged: `Maximum(0.3)`."""


def merge_metrics(parts: list[dict[str, Metric]]) -> dict[str, float]:
    """Combine the metrics of several micro-batches; a mean with zero total weight is left out."""
    merged: dict[str, float] = {}
    for name in dict.fromkeys(key for part in parts for key in part):
        found = [part[name] for part in parts if name in part]
        if found[0].reduce == "max":
            merged[name] = Maximum(max(float(metric.total) for metric in found))
            continue
        weight = sum(float(metric.weight) for metric in found)
        if weight > 0:
            merged[name] = sum(float(metric.total) for metric in found) / weight
    return merged


def reduced(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combine the metrics of steps or ranks, equally weighted: the mean over those that have it, or the maximum.

    reduced([{"loss": 1.0, "gap": Maximum(0.1)}, {"loss": 2.0, "gap": Maximum(0.3)}])  # {"loss": 1.5, "gap": 0.3}
    """
    names = dict.fromkeys(name for part in parts for name in part)
    found = {name: [part[name] for part in parts if name in part] for name in names}
    return {
        name: max(values) if isinstance(values[0], Maximum) else sum(values) / len(values)
        for name, values in found.items()
    }
