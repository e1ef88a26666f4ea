"""Turns sampled completions into a training batch: rewards, advantages, references, gate."""

import time
from collections.abc import Callable, Sequence
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
from nemo_mapo.data.sequences import padded, response_mask, row_slices, select_batch, select_rows, token_batch
from nemo_mapo.data.tokenizer import SpecialTokens
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
from nemo_mapo.rows import Completion, Group, completions_of, training_rows
from nemo_mapo.training.actor import MapoActor
from nemo_mapo.training.contrast import audio_contrast
from nemo_mapo.training.references import OwnReference
from nemo_mapo.training.signals import TokenSignals
from nemo_mapo.training.tars import Alignment, alignment
from nemo_mapo.types import Maximum, RolloutBatch, TokenBatch

Timer = Callable[[str], AbstractContextManager[None]]
"""Times a named section: `with timer("rollout"): ...`."""


@dataclass(frozen=True, kw_only=True)
class ScoredRollouts:
    """A batch ready for the objective, with what log and sample page show about it."""

    batch: RolloutBatch
    rewards: RewardTable
    signals: TokenSignals
    """The policy's signals at rollout time; 0 on rows of the first optimiser step that nothing asked for sooner, until
    the training pass puts in what it reads (`batch.old_log_probs` are these very log-probs)."""
    metrics: dict[str, float]

    def in_steps(self, count: int) -> list[tuple[slice, RolloutBatch]]:
        """Rows and batch of each of `count` optimiser steps; in the first, pi_old is the policy that is trained."""
        total = len(self.batch.advantages)
        (rows, first), *later = [(rows, select_batch(self.batch, rows)) for rows in row_slices(total, total // count)]
        return [(rows, replace(first, old_log_probs=None)), *later]


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
        wanted, completions, group_size = self.objective.uses_text_reference, completions_of(groups), len(groups[0])
        gate_future = self._gate_worker.submit(self._gate if wanted else _open_gate, groups)
        sequences = token_batch(training_rows(groups), pad_id=self.special.pad_id)
        with timer("reference"):
            signals = self._read_before_training(sequences, completions, actor)
            ref_log_probs = actor.get_init_policy_logprobs(sequences)
            text_entropy = actor.reference.text_entropy(sequences) if wanted else None
            signal = self._signal(sequences, signals, actor) if wanted else None
            text_only = None
            if self.objective.compares_without_audio:
                own = OwnReference(actor.policy, self.special, batching=actor.batching)
                text_only = own.text_log_probs(sequences)
        with timer("rewards"):
            penalty = self._overlong_penalty(groups)
            unpenalised = score_groups(groups, self.rewards) if known is None else known
            aligned = self._alignment(groups, sequences, unpenalised, actor)
            totals = torch.tensor(unpenalised.total) + penalty + aligned.reward
            table = RewardTable(by_reward=unpenalised.by_reward, total=totals.tolist())
        if self.rewards.asks_judge:
            self._refuse_too_few_verdicts(table)
        gate, gate_metrics = gate_future.result()
        kept = response_mask(sequences.completion_lengths, signals.log_probs.shape[1])
        scales = self._scales(signals.log_probs, text_only, kept)
        batch = RolloutBatch(
            sequences=sequences,
            response_mask=kept,
            old_log_probs=signals.log_probs,
            ref_log_probs=ref_log_probs,
            text_ref_entropy_nats=text_entropy,
            pos_gate=gate,
            advantages=self._advantages(totals, table, group_size) * scales,
            accuracy_rewards=torch.tensor(table.accuracy),
            finished=torch.tensor([one.stopped for one in completions]),
            behaviour_log_probs=(
                None
                if self.objective.behaviour_clip is None
                else padded([one.sampling_log_probs for one in completions])
            ),
            text_only_log_probs=text_only,
            audio_signal=signal,
        )
        metrics = rollout_metrics(groups, table) | gate_metrics | aligned.metrics
        metrics["rollout/equal_reward_groups"] = float(_equal_groups(totals, group_size).float().mean())
        if self.objective.overlong_buffer > 0:
            metrics["rollout/overlong_penalty"] = float(penalty.mean())
        if self.rewards.asks_judge:
            metrics["rollout/verdicts_missing"] = table.missing_share
        return ScoredRollouts(batch=batch, rewards=table, signals=signals, metrics=metrics)

    def _read_before_training(
        self, sequences: TokenBatch, completions: Sequence[Completion], actor: MapoActor
    ) -> TokenSignals:
        """The policy's signals for rows that are trained on after an update; 0 for the first optimiser step.

        That step runs its rows with the same policy anyway (docs/decisions/0018). All rows are scored if the objective
        needs log pi of the batch earlier, or if the engine cannot report log pi and log mu has to be compared.
        """
        drawing = None
        if any(one.log_probs is None for one in completions):
            drawing = Drawing.of(self.rollout.sampling, self.tokenizer, actor.policy.vocab_size)
        sooner = self.objective.signal == "log_ratio" or self.objective.vppo_scale_floor is not None
        first = 0 if sooner or drawing is not None else len(completions) // self.optimizer_steps
        signals = TokenSignals.unread(sequences, mass=actor.captures_audio_mass, drawn=drawing is not None)
        if first < len(completions):
            later = slice(first, len(completions))
            signals.put(later, actor.get_inference_signals(select_rows(sequences, later), drawing).stacked())
        return signals

    def _signal(self, sequences: TokenBatch, signals: TokenSignals, actor: MapoActor) -> Tensor | None:
        kind, log_probs = self.objective.signal, signals.log_probs
        return audio_contrast(actor.policy, actor.reference, sequences, log_probs, kind, actor.batching)

    def _alignment(
        self, groups: Sequence[Group], sequences: TokenBatch, table: RewardTable, actor: MapoActor
    ) -> Alignment:
        config = self.rewards.tars
        if config is None:
            return Alignment(reward=torch.zeros(len(table.total)), metrics={})
        embedder = OpenAIClient(self.rewards.judge) if config.behaviour > 0 else None
        return alignment(
            groups, sequences, table.accuracy, actor.policy, config, batching=actor.batching, embedder=embedder
        )

    def _advantages(self, totals: Float[Tensor, " batch"], table: RewardTable, group_size: int) -> Tensor:
        cfg = self.objective
        if cfg.advantages == "total":
            return group_advantages(totals, group_size, use_std=cfg.advantage_std, epsilon=cfg.advantage_epsilon)
        there = {name: [value for value in values if value is not None] for name, values in table.by_reward.items()}
        advantages = decoupled_advantages(there, self.rewards.weights, group_size, epsilon=cfg.advantage_epsilon)
        squares = gather_over_data_parallel(float((advantages**2).mean()))
        mean_square = sum(squares) / len(squares)
        return advantages / batch_scale(mean_square, epsilon=cfg.advantage_epsilon)

    def _scales(self, old: Tensor, text_only: Tensor | None, kept: Bool[Tensor, "batch time"]) -> Tensor:
        """VPPO's factors of the advantages, over the whole rollout batch; 1 without them."""
        if text_only is None or self.objective.vppo_scale_floor is None:
            return torch.ones(len(kept))
        means = audio_dependency(old, text_only, kept).sum(-1) / kept.sum(-1).clamp(min=1)
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

    def _gate(self, groups: Sequence[Group]) -> tuple[Bool[Tensor, "batch time"], dict[str, float]]:
        started = time.perf_counter()
        # What the prompt has begun belongs to the first sentence.
        begun = [
            prefill(group.prompt.token_ids.tolist(), self.tokenizer) for group in groups for _ in group.completions
        ]
        ids = [[*start, *one.token_ids.tolist()] for start, one in zip(begun, completions_of(groups), strict=True)]
        whole, fallbacks = gate_batch(
            ids, self.tokenizer, self.objective.pos_tags, self.tagger, words=self.objective.gate_words
        )
        gate = padded([torch.tensor(row[len(start) :]) for row, start in zip(whole, begun, strict=True)])
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


def agreement(
    signals: TokenSignals, completions: Sequence[Completion], response_mask: Bool[Tensor, "batch time"]
) -> dict[str, float]:
    """Agreement of the log-probs of engine and training, under the model's distribution or the one sampled from.

    Tokens at the edge of top-k or top-p that training could not have sampled are counted separately.
    """
    ours, theirs = signals.log_probs, [one.log_probs for one in completions if one.log_probs is not None]
    metrics: dict[str, float] = {}
    if len(theirs) < len(completions):
        assert signals.drawn_log_probs is not None
        ours, theirs = signals.drawn_log_probs, [one.sampling_log_probs for one in completions]
        outside = response_mask & ours.isneginf()
        metrics["rollout/log_prob_outside"] = float(outside.sum() / response_mask.sum())
        response_mask = response_mask & ~outside
    stated = padded(theirs).masked_fill(~response_mask, 0.0)
    ours = ours.masked_fill(~response_mask, 0.0)
    gaps = (ours - stated).abs()
    metrics["rollout/log_prob_gap"] = Maximum(gaps.max())
    metrics["rollout/log_prob_mismatch"] = float((gaps.sum(1) / torch.tensor([len(one) for one in completions])).mean())
    metrics["rollout/log_prob_correlation"] = _correlation(ours[response_mask], stated[response_mask])
    return metrics


def _correlation(one: Float[Tensor, " token"], other: Float[Tensor, " token"]) -> float:
    """Pearson's r; of log-probs that are all equal, 1 if both sides agree and 0 if not."""
    one, other = one.double() - one.double().mean(), other.double() - other.double().mean()
    scale = float(one.norm() * other.norm())
    return float(one @ other) / scale if scale > 0 else float(torch.equal(one, other))


def _open_gate(groups: Sequence[Group]) -> tuple[Bool[Tensor, "batch time"], dict[str, float]]:
    """All tokens, for an objective without a gate."""
    lengths = [len(one) for one in completions_of(groups)]
    return torch.ones(len(lengths), max(lengths), dtype=torch.bool), {}


def _equal_groups(totals: Float[Tensor, " batch"], group_size: int) -> Bool[Tensor, " group"]:
    groups = totals.view(-1, group_size)
    return (groups == groups[:, :1]).all(dim=1)


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values)
