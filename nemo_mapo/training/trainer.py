"""The MAPO training loop, keeping NeMo-Aligner's trainer contract."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from nemo_mapo.aligner import CustomLoggerWrapper, Timer
from nemo_mapo.config.run import MAX_COMPLETIONS_PER_STEP, RunConfig
from nemo_mapo.data.sequences import row_slices, select_batch
from nemo_mapo.models.tensors import policy_tensors
from nemo_mapo.objective.metrics import MAXIMA
from nemo_mapo.rewards.judged import RewardsUnavailable
from nemo_mapo.rewards.templates import prompt_wording
from nemo_mapo.rollout.protocol import OverlappingBackend, RolloutUnavailable
from nemo_mapo.rows import Completion, Group, Problem, completions_of
from nemo_mapo.training.actor import MapoActor
from nemo_mapo.training.ahead import RolloutsAhead
from nemo_mapo.training.checkpoint import CheckpointStore
from nemo_mapo.training.dynamic_sampling import Refilled, RefillingPromptStream, refill
from nemo_mapo.training.early_signs import EarlySigns
from nemo_mapo.training.loop import TrainingLoop, Validator
from nemo_mapo.training.optimizer import PolicyOptimizer
from nemo_mapo.training.prompts import PromptStream
from nemo_mapo.training.ranks import (
    data_parallel_prompts,
    is_main_rank,
    mean_over_data_parallel,
    sum_over_data_parallel,
)
from nemo_mapo.training.samples import SampleWriter
from nemo_mapo.training.scoring import SCORING_MAXIMA, RolloutScorer, ScoredRollouts
from nemo_mapo.training.tars import MODALITIES, with_text_twins

logger = logging.getLogger(__name__)

_SEEDS_PER_STEP = MAX_COMPLETIONS_PER_STEP
"""Rows of a step get consecutive seeds; steps are this far apart."""
_SEEDS_PER_RUN = 2**44
"""Runs with different `seed` are this far apart: no two rows of any two runs share a seed."""


class MapoTrainer(TrainingLoop):
    """Generates, scores, optimises; the random numbers of sampling follow from seed, step and row."""

    name = "MAPO"

    def __init__(
        self,
        config: RunConfig,
        actor: MapoActor,
        scorer: RolloutScorer,
        optimizer: PolicyOptimizer,
        prompts: PromptStream,
        validate: Validator,
        logger: CustomLoggerWrapper,
        samples: SampleWriter,
        checkpoints: CheckpointStore,
        run_timer: Timer,
    ) -> None:
        self.actor = actor
        self.scorer = scorer
        mapo = config.trainer.mapo
        self.refills = None if mapo.dynamic_sampling is None else RefillingPromptStream(prompts)
        super().__init__(
            config,
            actor.policy,
            optimizer,
            prompts if self.refills is None else self.refills,
            validate,
            logger,
            checkpoints,
            run_timer,
        )
        self.mapo = mapo
        self.samples = samples
        self._ahead: RolloutsAhead | None = None
        self._prompt_figures: dict[str, float] = {}
        self.signs = EarlySigns(config)

    def next_step(self) -> dict[str, float]:
        """A step; where rewards or rollouts cannot be had, a checkpoint of the state before it, and the error again."""
        before = self.state_dict()
        try:
            return self.train_step()
        except (RewardsUnavailable, RolloutUnavailable):
            if self.cfg.save_interval > 0:
                self.checkpoints.save(self.step, self.actor.policy, self.optimizer, before)
            raise

    def train_step(self) -> dict[str, float]:
        """One rollout batch: generate, score, and take its optimiser steps."""
        started = time.perf_counter()
        groups = self.generate_rollouts()
        staleness = self._staleness(groups)
        generated = sum_over_data_parallel(sum(map(len, completions_of(groups))))
        refilled = self._refill(groups)
        if refilled is not None:
            groups = refilled.groups
        scored = self.scorer(groups, self.actor, self.timer, None if refilled is None else refilled.rewards)
        self.actor.finish_inference()
        with self.timer("train"):
            metrics = self.run_training(scored)
        self.step += 1
        if is_main_rank():
            self.samples.write_training(self.step, groups[0], scored)
        metrics |= mean_over_data_parallel(scored.metrics, maxima=SCORING_MAXIMA) | self.timings()
        metrics |= self._prompt_figures
        if refilled is not None:
            metrics |= refilled.metrics
        metrics["timing/step_seconds"] = time.perf_counter() - started
        # What is generated ahead takes the time of the step, and the trainer waits for little of it.
        seconds = metrics["timing/step_seconds" if self.config.max_staleness else "timing/rollout_seconds"]
        metrics["rollout/tokens_per_second"] = generated / seconds
        metrics["rollout/staleness"] = staleness
        self._warn_of_mismatch(metrics["rollout/log_prob_mismatch"])
        self.signs.watch(metrics)
        return metrics

    def _warn_of_mismatch(self, nats: float) -> None:
        limit = self.config.rollout.log_prob_alarm
        if nats > limit and is_main_rank():
            logger.warning(
                f"step {self.step}: log-probs of the rollout engine and of training differ by {nats:.3g} nats a token "
                f"on average, more than rollout.log_prob_alarm={limit:g}"
            )

    @property
    def samples_per_step(self) -> int:
        """Completions of a rollout batch, over all ranks."""
        return self.prompts.batch_size * self.mapo.num_rollouts_per_prompt

    @torch.no_grad()
    def generate_rollouts(self) -> list[Group]:
        """Sample a group of completions for this rank's share of the next prompts.

        With `max_staleness` those of the step after are begun as soon as these are there, before these are trained on.
        The policy is left in evaluation mode.
        """
        self.actor.prepare_for_inference()
        if self.config.max_staleness == 0:
            with self.timer("data"):
                problems, group_size, seeds = self._next_request(self.step)
            self._send_weights()
            with self.timer("rollout"):
                completions = self._infer(problems, group_size, seeds)
            self._prompt_figures = self.prompts.figures()
        else:
            self._ahead = self._ahead or self._begin(self.step)
            with self.timer("rollout"):
                problems, completions = self._ahead.problems, self._ahead.pending.result()
            self._prompt_figures = self._ahead.figures
            with self.timer("begin_next"):
                self._ahead = self._begin(self.step + 1) if self.step + 1 < self.max_steps else None
        self.consumed_samples += self.samples_per_step
        return _answered(problems, completions)

    def _infer(
        self, problems: Sequence[Problem], group_size: int, seeds: Int[Tensor, " batch"]
    ) -> list[list[Completion]]:
        prompts = [problem.prompt for problem in problems]
        return self.actor.infer(prompts, self.config.rollout.sampling, group_size=group_size, seeds=seeds)

    def _begin(self, step: int) -> RolloutsAhead:
        """Have the vLLM servers begin the batch of `step` with the present weights."""
        before, epoch = self.prompts.state_dict(), self.prompts.epoch
        problems, group_size, seeds = self._next_request(step)
        self._send_weights()
        engine = self.actor.rollout
        assert isinstance(engine, OverlappingBackend), "the config demands it"
        prompts = [problem.prompt for problem in problems]
        pending = engine.begin(prompts, self.config.rollout.sampling, group_size=group_size, seeds=seeds)
        return RolloutsAhead(
            pending=pending, problems=problems, prompts=before, epoch=epoch, figures=self.prompts.figures()
        )

    def _next_request(self, step: int) -> tuple[list[Problem], int, Int[Tensor, " batch"]]:
        """The next problems, completions of each, and their seeds in the batch of `step`.

        Seeds follow the completion's number in the whole batch: how many ranks share it out changes no sample.
        """
        problems = next(self.prompts)
        group_size = self.mapo.num_rollouts_per_prompt
        if self.config.rewards.tars is not None:
            problems = with_text_twins(
                problems, self.scorer.tokenizer, prompt_wording(self.config.data.prompt, self.config.rewards.template)
            )
            group_size //= MODALITIES
        return problems, group_size, self._seeds(self._places(), step)

    def _send_weights(self) -> None:
        self.actor.rollout.update_weights(self.optimization_step, policy_tensors(self.actor.policy))

    def _staleness(self, groups: Sequence[Group]) -> float:
        """Rollout batches that the weights sampled from are behind the present ones."""
        version = groups[0].completions[0].weight_version
        behind = (self.optimization_step - version) / self.config.steps_per_generation
        assert 0 <= behind <= self.config.max_staleness, f"version {version} is {behind} batches old"
        return behind

    @contextmanager
    def cleaned_up(self) -> Iterator[None]:
        """However the loop ends, servers are asked for nothing more."""
        try:
            yield
        finally:
            if self._ahead is not None:
                self._ahead.pending.abandon()

    def _refill(self, groups: Sequence[Group]) -> Refilled | None:
        """Dynamic sampling, if the config asks for it; other prompts for groups of equal rewards."""
        if self.refills is None:
            return None
        assert self.mapo.dynamic_sampling is not None
        stream, group_size = self.refills, self.mapo.num_rollouts_per_prompt

        def sample(number: int, places: list[int], mine: list[int]) -> list[Group]:
            problems = stream.spare(len(places), mine)
            seeds = self._seeds([places[index] for index in mine], self.step, number)
            return _answered(problems, self._infer(problems, group_size, seeds))

        with self.timer("refill"), torch.no_grad():
            refilled = refill(
                groups,
                places=self._places(),
                max_rounds=self.mapo.dynamic_sampling.max_generation_rounds,
                score=self.scorer.rewards_of,
                sample=sample,
            )
        self.consumed_samples += refilled.sampled * group_size - self.samples_per_step
        return refilled

    def _places(self) -> list[int]:
        """Where this rank's prompts stand in the whole batch."""
        return data_parallel_prompts(self.prompts.batch_size, self.config.steps_per_generation)

    def _seeds(self, places: list[int], step: int, number: int = 0) -> Int[Tensor, " batch"]:
        """A seed for every completion of the prompts at `places`, in a round of generation (0 the first) of `step`."""
        first = self.config.seed * _SEEDS_PER_RUN + step * _SEEDS_PER_STEP + number * self.samples_per_step
        per_prompt = self.mapo.num_rollouts_per_prompt
        return first + (torch.tensor(places)[:, None] * per_prompt + torch.arange(per_prompt)).flatten()

    def run_training(self, scored: ScoredRollouts) -> dict[str, float]:
        """Take the optimiser steps of one rollout batch; returns metrics averaged over them.

        Raises:
            FloatingPointError: naming a bad tensor, after `max_skipped_steps` steps in a row that were not finite.
        """
        self.actor.prepare_for_training()
        history: list[dict[str, float]] = []
        rows_per_step = len(scored.batch.advantages) // self.config.steps_per_generation
        for rows in row_slices(len(scored.batch.advantages), rows_per_step):
            self.optimizer.zero_grad()
            self.actor.prepare_for_training_step()
            loss, metrics = self.actor.get_loss_and_metrics(select_batch(scored.batch, rows), forward_only=False)
            self.actor.finish_training_step()
            metrics |= self.update(loss)
            history.append(metrics)
        self.optimizer.zero_grad()
        self.actor.finish_training()
        return mean_over_steps(history)

    def validated(self) -> None:
        """Show the last group of completions to the loggers."""
        if is_main_rank():
            self.samples.log_table(self.logger, self.step)

    def facts(self) -> dict[str, Any]:
        """Which part-of-speech tagger gates the masks."""
        return {"pos_tagger": self.scorer.tagger.name}

    def state_dict(self) -> dict[str, Any]:
        """Everything but weights and optimiser state; the data position is that before what was generated ahead."""
        state = super().state_dict() | {"pos_tagger": self.scorer.tagger.name}
        if self._ahead is not None:
            state |= {"epoch": self._ahead.epoch, "prompts": self._ahead.prompts}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: if the run is past its last step, or its part-of-speech gate used another tagger.
        """
        if state["pos_tagger"] != self.scorer.tagger.name:
            raise ValueError(
                f"the run used the part-of-speech tagger {state['pos_tagger']}, this machine offers "
                f"{self.scorer.tagger.name}; make NLTK's averaged_perceptron_tagger_eng available (or unavailable) as "
                "it was then"
            )
        super().load_state_dict(state)

    def shown(self, metrics: dict[str, float]) -> dict[str, str]:
        """Reward, speed, accuracy, audio mass."""
        shown = {
            "reward": f"{metrics['rollout/reward_mean']:.2f}",
            "tok/s": f"{metrics['rollout/tokens_per_second']:.0f}",
        }
        for label, key in (("acc", "rollout/accuracy"), ("mass", "mapo/audio_mass")):
            if key in metrics:
                shown[label] = f"{metrics[key]:.2f}"
        return shown


def _answered(problems: Sequence[Problem], completions: Sequence[Sequence[Completion]]) -> list[Group]:
    return [problem.answered(drawn) for problem, drawn in zip(problems, completions, strict=True)]


def mean_over_steps(history: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each figure over the optimiser steps that report it; of a maximum, the maximum."""
    names = dict.fromkeys(name for metrics in history for name in metrics)
    reported = {name: [metrics[name] for metrics in history if name in metrics] for name in names}
    return {name: max(values) if name in MAXIMA else sum(values) / len(values) for name, values in reported.items()}
