"""Held-out accuracy with and without the audio, and audio attention along completions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from nemo_mapo.attention.session import HeadReduction
from nemo_mapo.config.rewards import RewardsConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.evaluation.profile import PositionProfile
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.ranks import data_parallel_share, gather_over_data_parallel, shares_experts
from nemo_mapo.rewards.templates import reasoning_words, split_completion
from nemo_mapo.rollout.protocol import RolloutBackend
from nemo_mapo.rows import Group, Problem, Prompt, Row, TokenSignals, completions_of, training_rows
from nemo_mapo.training.references import FrozenReference
from nemo_mapo.training.samples import sample_record
from nemo_mapo.training.scoring import score_groups
from nemo_mapo.training.signals import token_signals_in_parts

SHOWN = 2
"""Questions of each batch whose completions are kept to be read and heard."""


@dataclass(frozen=True, kw_only=True)
class QuestionScore:
    """The result of one question."""

    id: str
    task: str
    choices: int
    """How many there are."""
    correct: float
    correct_silent: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Greedy decoding of one split."""

    accuracy: float
    accuracy_silent: float
    """With every clip replaced by silence of the same length; chance if the task depends on the audio."""
    reward: float
    format: float
    """Share of completions that follow `rewards.template` in everything."""
    completion_tokens: float
    reasoning_words: float
    samples: int
    chance: float
    """Lowest probability of guessing one of the questions right."""
    profile: PositionProfile
    accuracy_by_task: dict[str, float]
    records: tuple[dict[str, Any], ...]
    questions: tuple["QuestionScore", ...]
    clips: dict[str, list[NDArray[np.float32]]]
    """Of the questions in `records`, by id."""

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy."""
        return float((self.accuracy * (1 - self.accuracy) / self.samples) ** 0.5)

    def metrics(self) -> dict[str, float]:
        """Flat metrics for metrics.jsonl."""
        flat = {
            "val/questions": float(self.samples),
            "val/accuracy": self.accuracy,
            "val/accuracy_silent": self.accuracy_silent,
            "val/reward": self.reward,
            "val/format": self.format,
            "val/completion_tokens": self.completion_tokens,
            "val/reasoning_words": self.reasoning_words,
            **{f"val/{name}": value for name, value in self.profile.thirds().items()},
        }
        return flat | {f"val/accuracy_{task}": value for task, value in self.accuracy_by_task.items()}


@dataclass
class _Found:
    """Counts collected while batches are evaluated."""

    correct: list[float] = field(default_factory=list)
    silent: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    in_format: list[float] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    clips: list[tuple[str, list[NDArray[np.float32]]]] = field(default_factory=list)
    profile: PositionProfile = field(default_factory=PositionProfile)

    @classmethod
    def merged(cls, parts: "list[_Found]") -> "_Found":
        """The sum of the counts of all ranks."""
        whole = cls(profile=PositionProfile.merged(part.profile for part in parts))
        counted = ("correct", "silent", "totals", "in_format", "tasks", "ids", "choices", "words", "lengths")
        for name in (*counted, "records", "clips"):
            vars(whole)[name] = [item for part in parts for item in vars(part)[name]]
        return whole


class Evaluator:
    """Evaluates a policy on the batches of one split; greedy, with the silent control."""

    def __init__(
        self,
        batches: Iterable[list[Problem]],
        *,
        rewards: RewardsConfig,
        sampling: SamplingConfig,
        reference: FrozenReference,
        detailed: bool = False,
    ) -> None:
        """`detailed` also measures the mean over heads, which costs one more pass."""
        # Ranks whose experts are sharded have to make the same calls.
        self.shared_out = not shares_experts()
        self.batches = data_parallel_share(tuple(batches)) if self.shared_out else tuple(batches)
        self.detailed = detailed
        self.rewards = rewards
        self.sampling = sampling.greedy
        self.reference = reference

    @torch.no_grad()
    def __call__(self, policy: AudioLLM, backend: RolloutBackend, *, step: int, split: str) -> Evaluation:
        """Evaluate, with the batches distributed over data-parallel ranks; the policy keeps its training mode."""
        was_training = policy.training
        policy.eval()
        found = _Found()
        for problems in self.batches:
            self._evaluate(problems, policy, backend, found, step=step, split=split)
        policy.train(was_training)
        found = _Found.merged(gather_over_data_parallel(found) if self.shared_out else [found])
        return Evaluation(
            accuracy=_mean(found.correct),
            accuracy_silent=_mean(found.silent),
            reward=_mean(found.totals),
            format=_mean(found.in_format),
            completion_tokens=_mean(found.lengths),
            reasoning_words=_mean(found.words),
            samples=len(found.correct),
            chance=1 / max(found.choices),
            profile=found.profile,
            accuracy_by_task=_by_task(found.tasks, found.correct),
            records=tuple(found.records),
            clips=dict(found.clips),
            questions=tuple(
                QuestionScore(id=name, task=task, choices=choices, correct=correct, correct_silent=silent)
                for name, task, choices, correct, silent in zip(
                    found.ids, found.tasks, found.choices, found.correct, found.silent, strict=True
                )
            ),
        )

    def _evaluate(
        self,
        problems: Sequence[Problem],
        policy: AudioLLM,
        backend: RolloutBackend,
        found: "_Found",
        *,
        step: int,
        split: str,
    ) -> None:
        groups = answered_once(problems, backend, self.sampling)
        completions, examples = completions_of(groups), [problem.example for problem in problems]
        table = score_groups(groups, self.rewards)
        found.correct += table.accuracy
        found.totals += table.total
        found.in_format += [float(split_completion(one.text, self.rewards.template) is not None) for one in completions]
        found.tasks += [example.task for example in examples]
        found.ids += [example.id for example in examples]
        found.choices += [len(example.choices) for example in examples]
        found.words += [reasoning_words(one.text) for one in completions]
        found.lengths += map(len, completions)
        found.clips += [(group.example.id, waveforms(group.prompt)) for group in groups[:SHOWN]]
        found.records += [
            sample_record(step, split, group, group.completions[0], table.row(row))
            for row, group in enumerate(groups[:SHOWN])
        ]
        silent = [replace(problem, prompt=problem.prompt.silenced()) for problem in problems]
        deaf = answered_once(silent, backend, self.sampling)
        found.silent += score_groups(deaf, self.rewards.accuracy_only).accuracy
        self._add_profile(found.profile, policy, training_rows(groups))

    def _add_profile(self, profile: PositionProfile, policy: AudioLLM, rows: Sequence[Row]) -> None:
        by_row = self._signals(policy, rows, "max")
        entropies = self.reference.text_entropy(rows)
        means = self._signals(policy, rows, "mean") if self.detailed else None
        for number, (signals, text_entropy) in enumerate(zip(by_row, entropies, strict=True)):
            curves = {
                "audio_mass_max": captured(signals),
                "delta_h_nats": text_entropy - signals.entropy_nats,
                "text_entropy_nats": text_entropy,
                "policy_entropy_nats": signals.entropy_nats,
            }
            profile.add(curves if means is None else curves | {"audio_mass_mean": captured(means[number])})

    def _signals(self, policy: AudioLLM, rows: Sequence[Row], reduction: HeadReduction) -> list[TokenSignals]:
        return token_signals_in_parts(policy, rows, head_reduction=reduction, batching=self.reference.batching)


def test_summary(before: Evaluation | None, after: Evaluation) -> dict[str, float]:
    """Start (if it was evaluated) and end on the test split."""
    start = (
        {}
        if before is None
        else {
            "start_accuracy": before.accuracy,
            "start_accuracy_silent": before.accuracy_silent,
            "start_audio_mass_late": before.profile.thirds()["audio_mass_late"],
            "start_completion_tokens": before.completion_tokens,
        }
    )
    return start | {
        "accuracy": after.accuracy,
        "accuracy_silent": after.accuracy_silent,
        "format": after.format,
        "audio_mass_late": after.profile.thirds()["audio_mass_late"],
        "completion_tokens": after.completion_tokens,
        "standard_error": after.standard_error,
        "samples": float(after.samples),
        **{f"accuracy_{task}": value for task, value in after.accuracy_by_task.items()},
    }


def test_records(step: int, before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    """One record per question of the test split, with the results of both policies."""
    assert [one.id for one in before.questions] == [one.id for one in after.questions]
    return [
        {"step": step, "id": end.id, "task": end.task, "choices": end.choices, "start_correct": start.correct,
         "start_silent": start.correct_silent, "correct": end.correct, "silent": end.correct_silent}
        for start, end in zip(before.questions, after.questions, strict=True)
    ]  # fmt: skip


def captured(signals: TokenSignals) -> Float[Tensor, " time"]:
    """The audio mass of a pass that was asked for it."""
    assert signals.audio_mass is not None
    return signals.audio_mass


def answered_once(problems: Sequence[Problem], backend: RolloutBackend, sampling: SamplingConfig) -> list[Group]:
    """One completion of each problem; for greedy `sampling`, which no seed changes."""
    seeds = torch.zeros(len(problems), dtype=torch.int64)
    drawn = backend.generate([problem.prompt for problem in problems], sampling, group_size=1, seeds=seeds)
    return [problem.answered(completions) for problem, completions in zip(problems, drawn, strict=True)]


def waveforms(prompt: Prompt) -> list[NDArray[np.float32]]:
    """The clips of a prompt in the form in which a file stores them."""
    return [clip.numpy() for clip in prompt.clips]


def _by_task(tasks: list[str], correct: list[float]) -> dict[str, float]:
    return {
        task: _mean([value for name, value in zip(tasks, correct, strict=True) if name == task])
        for task in sorted(set(tasks))
    }


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values)
