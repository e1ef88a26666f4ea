"""Turns sampled completions into a training batch: rewards, advantages, references, gate."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.config.rewards import RewardsConfig
from nemo_mapo.config.run import RolloutConfig, RunConfig
from nemo_mapo.data.prompts import prefill
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.layout import in_parts
from nemo_mapo.objective.advantages import group_advantages, soft_overlong_penalty
from nemo_mapo.objective.decoupled import batch_scale, decoupled_advantages
from nemo_mapo.objective.dependency import audio_dependency, completion_scales
from nemo_mapo.pos_gate.gate import gate_batch
from nemo_mapo.pos_gate.tagger import PERCEPTRON_PACKAGE, Tagger
from nemo_mapo.ranks import any_rank, gather_over_data_parallel
from nemo_mapo.rewards.combined import RewardTable, score
from nemo_mapo.rewards.judge import OpenAIClient
from nemo_mapo.rewards.judged import RewardsUnavailable
from nemo_mapo.rewards.protocol import RewardSample
from nemo_mapo.rewards.templates import reasoning_words
from nemo_mapo.rollout.scoring import Drawing
from nemo_mapo.rows import Completion, Group, Row, ScoredRow, TokenSignals, completions_of, training_rows
from nemo_mapo.training.actor import MapoActor
from nemo_mapo.training.contrast import audio_contrast
from nemo_mapo.training.references import OwnReference
from nemo_mapo.training.tars import Alignment, alignment
from nemo_mapo.types import Maximum

Timer = Callable[[str], AbstractContextManager[None]]
"""Times a named section: `with timer("rollout"): ...`."""


@dataclass(frozen=True, kw_only=True)
class ScoredRollouts:
    """Rows ready for the objective, with what log and sample page show about them."""

    rows: list[ScoredRow]
    rewards: RewardTable
    signals: dict[int, TokenSignals]
    """The policy's signals at rollout time by row; those of the first optimiser step come with its training pass,
    unless something asked for them sooner."""
    metrics: dict[str, float]

    def in_steps(self, count: int) -> list[list[ScoredRow]]:
        """The rows of each of `count` optimiser steps."""
        return in_parts(self.rows, len(self.rows) // count)

    def first_step_read(self, signals: Sequence[TokenSignals]) -> None:
        """Take the signals that the first training pass read of its rows; log mu stays as it was read before."""
        for row, now in enumerate(signals):
            before = self.signals.get(row)
            self.signals[row] = now if before is None else replace(now, drawn_log_probs=before.drawn_log_probs)


class RolloutScorer:
    """Scores rollouts; the POS gate runs on the CPU while the reference passes run."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        special: SpecialTokens,
        tagger: Tagger,
        rewards: RewardsConfig,
        objective: ObjectiveConfig,
        rollout: RolloutConfig,
        *,
        optimizer_steps: int,
    ) -> None:
        """Take the parts of a run; each batch is trained on in the given number of optimiser steps."""
        self.tokenizer = tokenizer
        self.special = special
        self.tagger = tagger
        self.rewards = rewards
        self.objective = objective
        self.rollout = rollout
        self.optimizer_steps = optimizer_steps
        self._gate_worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pos-gate")

    @classmethod
    def of(
        cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, tagger: Tagger
    ) -> "RolloutScorer":
        """As the config says."""
        return cls(
            tokenizer,
            special,
            tagger,
            config.rewards,
            config.resolved_objective,
            config.rollout,
            optimizer_steps=config.steps_per_generation,
        )

    def rewards_of(self, groups: Sequence[Group]) -> tuple[RewardTable, Bool[Tensor, " group"]]:
        """Only the rewards, and which groups have unequal rewards after length penalties."""
        table = score_groups(groups, self.rewards)
        totals = torch.tensor(table.total) + self._overlong_penalty(groups)
        return table, ~_equal_groups(totals, len(groups[0]))

    def __call__(
        self, groups: Sequence[Group], actor: MapoActor, timer: Timer, known: RewardTable | None = None
    ) -> ScoredRollouts:
        """Compute rewards (if not `known`), advantages, gate, log pi_old, log pi_ref and text-reference entropies."""
        wanted, group_size = self.objective.uses_text_reference, len(groups[0])
        gate_future = self._gate_worker.submit(self._gate if wanted else _open_gate, groups)
        rows, completions = training_rows(groups), completions_of(groups)
        first_step = range(len(rows) // self.optimizer_steps)
        with timer("reference"):
            signals = self._read_before_training(rows, completions, actor)
            ref_log_probs = actor.get_init_policy_logprobs(rows)
            text_entropy = actor.reference.text_entropy(rows) if wanted else None
            signal = self._signal(rows, signals, actor) if wanted else None
            text_only = None
            if self.objective.compares_without_audio:
                own = OwnReference(actor.policy, self.special, batching=actor.batching)
                text_only = own.text_log_probs(rows)
        with timer("rewards"):
            penalty = self._overlong_penalty(groups)
            unpenalised = score_groups(groups, self.rewards) if known is None else known
            aligned = self._alignment(groups, unpenalised, actor)
            totals = torch.tensor(unpenalised.total) + penalty + aligned.reward
            table = RewardTable(by_reward=unpenalised.by_reward, total=totals.tolist())
        if self.rewards.asks_judge:
            self._refuse_too_few_verdicts(table)
        gate, gate_metrics = gate_future.result()
        advantages = self._advantages(totals, table, group_size) * self._scales(signals, text_only, len(rows))
        scored = [
            ScoredRow(
                prompt=row.prompt,
                token_ids=row.token_ids,
                # In the first step pi_old is the policy that is trained.
                old_log_probs=None if number in first_step else signals[number].log_probs,
                ref_log_probs=ref_log_probs[number],
                text_ref_entropy_nats=None if text_entropy is None else text_entropy[number],
                pos_gate=gate[number],
                advantages=advantages[number],
                accuracy_rewards=torch.tensor(table.accuracy[number]),
                finished=torch.tensor(one.stopped),
                behaviour_log_probs=None if self.objective.behaviour_clip is None else one.sampling_log_probs,
                text_only_log_probs=None if text_only is None else text_only[number],
                audio_signal=None if signal is None else signal[number],
            )
            for number, (row, one) in enumerate(zip(rows, completions, strict=True))
        ]
        metrics = rollout_metrics(groups, table) | gate_metrics | aligned.metrics
        metrics["rollout/equal_reward_groups"] = float(_equal_groups(totals, group_size).float().mean())
        if self.objective.overlong_buffer > 0:
            metrics["rollout/overlong_penalty"] = float(penalty.mean())
        if self.rewards.asks_judge:
            metrics["rollout/verdicts_missing"] = table.missing_share
        return ScoredRollouts(rows=scored, rewards=table, signals=signals, metrics=metrics)

    def _read_before_training(
        self, rows: Sequence[Row], completions: Sequence[Completion], actor: MapoActor
    ) -> dict[int, TokenSignals]:
        """The policy's signals for rows that are trained on after an update: those behind the first optimiser step.

        That step runs its rows with the same policy anyway (docs/decisions/0018). All rows are scored if the objective
        needs log pi of the batch earlier, or if the engine cannot report log pi and log mu has to be compared.
        """
        drawing = None
        if any(one.log_probs is None for one in completions):
            drawing = Drawing.of(self.rollout.sampling, self.tokenizer, actor.policy.vocab_size)
        sooner = self.objective.signal == "log_ratio" or self.objective.vppo_scale_floor is not None
        first = 0 if sooner or drawing is not None else len(completions) // self.optimizer_steps
        return dict(enumerate(actor.get_inference_signals(rows[first:], drawing), first))

    def _signal(
        self, rows: Sequence[Row], signals: Mapping[int, TokenSignals], actor: MapoActor
    ) -> list[Float[Tensor, "_"]] | None:
        kind = self.objective.signal
        return audio_contrast(actor.policy, actor.reference, rows, signals, kind, actor.batching)

    def _alignment(self, groups: Sequence[Group], table: RewardTable, actor: MapoActor) -> Alignment:
        config = self.rewards.tars
        if config is None:
            return Alignment(reward=torch.zeros(len(table.total)), metrics={})
        embedder = OpenAIClient(self.rewards.judge) if config.behaviour > 0 else None
        return alignment(groups, table.accuracy, actor.policy, config, batching=actor.batching, embedder=embedder)

    def _advantages(self, totals: Float[Tensor, " batch"], table: RewardTable, group_size: int) -> Tensor:
        cfg = self.objective
        if cfg.advantages == "total":
            return group_advantages(totals, group_size, use_std=cfg.advantage_std, epsilon=cfg.advantage_epsilon)
        there = {name: [value for value in values if value is not None] for name, values in table.by_reward.items()}
        advantages = decoupled_advantages(there, self.rewards.weights, group_size, epsilon=cfg.advantage_epsilon)
        squares = gather_over_data_parallel(float((advantages**2).mean()))
        mean_square = sum(squares) / len(squares)
        return advantages / batch_scale(mean_square, epsilon=cfg.advantage_epsilon)

    def _scales(
        self, signals: Mapping[int, TokenSignals], text_only: Sequence[Tensor] | None, completions: int
    ) -> Float[Tensor, " batch"]:
        """VPPO's factors of the advantages, over the whole rollout batch; 1 without them."""
        if text_only is None or self.objective.vppo_scale_floor is None:
            return torch.ones(completions)
        old = [signals[number].log_probs[None] for number in range(completions)]
        dependencies = [
            audio_dependency(heard, unheard[None], torch.ones_like(heard, dtype=torch.bool))
            for heard, unheard in zip(old, text_only, strict=True)
        ]
        means = torch.stack([dependency.mean() for dependency in dependencies])
        of_all = gather_over_data_parallel(means.tolist())
        everywhere = torch.tensor([value for rank in of_all for value in rank], dtype=torch.float64)
        floor = self.objective.vppo_scale_floor
        scales = dict(zip(everywhere.tolist(), completion_scales(everywhere, floor=floor).tolist(), strict=True))
        return torch.tensor([scales[value] for value in means.tolist()])

    def _refuse_too_few_verdicts(self, table: RewardTable) -> None:
        """RewardsUnavailable on all ranks if more verdicts are missing on any of them than the config allows."""
        limit = self.rewards.max_missing_share
        if any_rank(table.missing_share > limit):
            raise RewardsUnavailable(
                f"{100 * table.missing_share:.0f} % of the verdicts of rewards.judge.base_url="
                f"{self.rewards.judge.base_url} are missing, more than rewards.max_missing_share={limit} allows"
            )

    def _gate(self, groups: Sequence[Group]) -> tuple[list[Bool[Tensor, "_"]], dict[str, float]]:
        started = time.perf_counter()
        # What the prompt has begun belongs to the first sentence.
        begun = [
            prefill(group.prompt.token_ids.tolist(), self.tokenizer) for group in groups for _ in group.completions
        ]
        ids = [[*start, *one.token_ids.tolist()] for start, one in zip(begun, completions_of(groups), strict=True)]
        whole, fallbacks = gate_batch(
            ids, self.tokenizer, self.objective.pos_tags, self.tagger, words=self.objective.gate_words
        )
        gate = [torch.tensor(row[len(start) :]) for row, start in zip(whole, begun, strict=True)]
        metrics = {f"mapo/gate_fallback_{reason}": count / len(ids) for reason, count in fallbacks.items()}
        metrics["mapo/gate_tagger_is_perceptron"] = float(self.tagger.name == PERCEPTRON_PACKAGE)
        metrics["mapo/gate_fallbacks"] = sum(fallbacks.values()) / len(ids)
        metrics["timing/pos_gate_seconds"] = Maximum(time.perf_counter() - started)
        return gate, metrics

    def _overlong_penalty(self, groups: Sequence[Group]) -> Tensor:
        lengths = torch.tensor([len(one) for one in completions_of(groups)])
        if self.objective.overlong_buffer == 0:
            return torch.zeros(len(lengths))
        return soft_overlong_penalty(
            lengths,
            max_length=self.rollout.sampling.max_new_tokens,
            buffer=self.objective.overlong_buffer,
        )


def score_groups(groups: Sequence[Group], rewards: RewardsConfig) -> RewardTable:
    """Rewards of every completion, group after group."""
    samples = [
        RewardSample(text=one.text, example=group.example, finished=one.stopped, num_tokens=len(one))
        for group in groups
        for one in group.completions
    ]
    return score(samples, rewards)


def rollout_metrics(groups: Sequence[Group], table: RewardTable) -> dict[str, float]:
    """Means over completions."""
    completions = completions_of(groups)
    metrics = {
        "rollout/reward_mean": _mean(table.total),
        "rollout/completion_tokens": float(torch.tensor([len(one) for one in completions]).float().mean()),
        "rollout/reasoning_words": _mean([reasoning_words(one.text) for one in completions]),
        "rollout/finished_share": float(torch.tensor([one.stopped for one in completions]).float().mean()),
    }
    there = {name: [value for value in values if value is not None] for name, values in table.by_reward.items()}
    return metrics | {f"rollout/{name}": _mean(values) for name, values in there.items() if values}


def agreement(signals: Mapping[int, TokenSignals], completions: Sequence[Completion]) -> dict[str, float]:
    """Agreement of the log-probs of engine and training, under the model's distribution or the one sampled from.

    Tokens at the edge of top-k or top-p that training could not have sampled are counted separately.
    """
    both = [signals[row] for row in range(len(completions))]
    theirs = [one.log_probs for one in completions if one.log_probs is not None]
    metrics: dict[str, float] = {}
    if len(theirs) == len(completions):
        ours, stated = torch.cat([one.log_probs for one in both]), torch.cat(theirs)
        outside = torch.zeros_like(ours, dtype=torch.bool)
    else:
        ours = torch.cat([one.drawn_log_probs for one in both if one.drawn_log_probs is not None])
        stated = torch.cat([one.sampling_log_probs for one in completions])
        outside = ours.isneginf()
        metrics["rollout/log_prob_outside"] = float(outside.sum() / len(outside))
    gaps = (ours - stated).abs().masked_fill(outside, 0.0)
    means = [of_completion.mean() for of_completion in torch.split(gaps, list(map(len, completions)))]
    metrics["rollout/log_prob_gap"] = Maximum(gaps.max())
    metrics["rollout/log_prob_mismatch"] = float(torch.stack(means).mean())
    metrics["rollout/log_prob_correlation"] = _correlation(ours[~outside], stated[~outside])
    return metrics


def _correlation(one: Float[Tensor, " token"], other: Float[Tensor, " token"]) -> float:
    """Pearson's r; of log-probs that are all equal, 1 if both sides agree and 0 if not."""
    one, other = one.double() - one.double().mean(), other.double() - other.double().mean()
    scale = float(one.norm() * other.norm())
    return float(one @ other) / scale if scale > 0 else float(torch.equal(one, other))


def _open_gate(groups: Sequence[Group]) -> tuple[list[Bool[Tensor, "_"]], dict[str, float]]:
    """All tokens, for an objective without a gate."""
    return [torch.ones(len(one), dtype=torch.bool) for one in completions_of(groups)], {}


def _equal_groups(totals: Float[Tensor, " batch"], group_size: int) -> Bool[Tensor, " group"]:
    groups = totals.view(-1, group_size)
    return (groups == groups[:, :1]).all(dim=1)


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values)
