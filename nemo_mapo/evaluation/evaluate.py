"""Held-out accuracy with and without ears, and how the model listens along its completions."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nemo_mapo.attention.session import HeadReduction
from nemo_mapo.config.run import RewardsConfig, SamplingConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.evaluation.profile import PositionProfile
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.rewards.templates import reasoning_words
from nemo_mapo.rollout.protocol import RolloutBackend
from nemo_mapo.training.references import FrozenReference
from nemo_mapo.training.samples import sample_record
from nemo_mapo.training.scoring import score_rollouts
from nemo_mapo.training.sequences import response_mask, token_batch
from nemo_mapo.training.signals import TokenSignals, token_signals_in_parts
from nemo_mapo.types import AudioBatch, PromptBatch, TokenBatch


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Greedy decoding of one split."""

    accuracy: float
    accuracy_silent: float
    """With every clip replaced by silence of the same length; chance when the task needs ears."""
    reward: float
    completion_tokens: float
    reasoning_words: float
    samples: int
    profile: PositionProfile
    accuracy_by_task: dict[str, float]
    records: tuple[dict[str, Any], ...]

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy."""
        return float((self.accuracy * (1 - self.accuracy) / self.samples) ** 0.5)

    def metrics(self) -> dict[str, float]:
        """Flat figures for metrics.jsonl."""
        flat = {
            "val/accuracy": self.accuracy,
            "val/accuracy_silent": self.accuracy_silent,
            "val/reward": self.reward,
            "val/completion_tokens": self.completion_tokens,
            "val/reasoning_words": self.reasoning_words,
            **{f"val/{name}": value for name, value in self.profile.thirds().items()},
        }
        return flat | {f"val/accuracy_{task}": value for task, value in self.accuracy_by_task.items()}


class Evaluator:
    """Evaluates a policy on the batches of one split; greedy, with the silent control."""

    def __init__(
        self,
        batches: Iterable[PromptBatch],
        *,
        rewards: RewardsConfig,
        sampling: SamplingConfig,
        special: SpecialTokens,
        reference: FrozenReference,
        detailed: bool = False,
    ) -> None:
        """`detailed` also measures the mean over heads, which costs another pass."""
        self.batches = tuple(batches)
        self.detailed = detailed
        self.rewards = rewards
        self.sampling = replace(sampling, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
        self.special = special
        self.reference = reference

    @torch.no_grad()
    def __call__(self, policy: AudioLLM, backend: RolloutBackend, *, step: int, split: str) -> Evaluation:
        """Evaluate; the policy is left in training mode as it was found."""
        was_training = policy.training
        policy.eval()
        correct: list[float] = []
        silent: list[float] = []
        totals: list[float] = []
        tasks: list[str] = []
        words: list[int] = []
        lengths: list[Tensor] = []
        records: list[dict[str, Any]] = []
        profile = PositionProfile()
        for prompts in self.batches:
            seeds = torch.zeros(len(prompts), dtype=torch.int64)
            rollouts = backend.generate(prompts, self.sampling, group_size=1, seeds=seeds)
            table = score_rollouts(rollouts, self.rewards)
            correct += table.accuracy
            totals += table.total
            tasks += [example.task for example in prompts.examples]
            words += [reasoning_words(text) for text in rollouts.texts]
            lengths.append(rollouts.completion_lengths)
            records += [sample_record(step, split, row, rollouts, table) for row in range(min(2, len(prompts)))]
            deaf = backend.generate(_silenced(prompts), self.sampling, group_size=1, seeds=seeds)
            silent += score_rollouts(deaf, self.rewards).accuracy
            self._add_profile(profile, policy, token_batch(rollouts, pad_id=self.special.pad_id))
        policy.train(was_training)
        return Evaluation(
            accuracy=_mean(correct),
            accuracy_silent=_mean(silent),
            reward=_mean(totals),
            completion_tokens=float(torch.cat(lengths).float().mean()),
            reasoning_words=_mean(words),
            samples=len(correct),
            profile=profile,
            accuracy_by_task=_by_task(tasks, correct),
            records=tuple(records),
        )

    def _add_profile(self, profile: PositionProfile, policy: AudioLLM, sequences: TokenBatch) -> None:
        signals = self._signals(policy, sequences, "max")
        text_entropy = self.reference.text_entropy(sequences)
        curves = {
            "audio_mass_max": _captured(signals),
            "delta_h_nats": text_entropy - signals.entropy_nats,
            "text_entropy_nats": text_entropy,
            "policy_entropy_nats": signals.entropy_nats,
        }
        if self.detailed:
            curves["audio_mass_mean"] = _captured(self._signals(policy, sequences, "mean"))
        profile.add(response_mask(sequences.completion_lengths, text_entropy.shape[1]), curves)

    def _signals(self, policy: AudioLLM, sequences: TokenBatch, reduction: HeadReduction) -> TokenSignals:
        batching = self.reference.batching
        return token_signals_in_parts(policy, sequences, head_reduction=reduction, batching=batching)


def _captured(signals: TokenSignals) -> Tensor:
    assert signals.audio_mass is not None
    return signals.audio_mass


def _silenced(prompts: PromptBatch) -> PromptBatch:
    silence = AudioBatch(waveforms=torch.zeros_like(prompts.audio.waveforms), lengths=prompts.audio.lengths)
    return replace(prompts, audio=silence)


def _by_task(tasks: list[str], correct: list[float]) -> dict[str, float]:
    return {
        task: _mean([value for name, value in zip(tasks, correct, strict=True) if name == task])
        for task in sorted(set(tasks))
    }


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values)
