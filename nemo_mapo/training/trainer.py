"""The MAPO training loop, keeping NeMo-Aligner's trainer contract."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from nemo_mapo.aligner import CustomLoggerWrapper, Timer
from nemo_mapo.config.run import RunConfig
from nemo_mapo.processes import is_main_rank
from nemo_mapo.ranks import gather_over_data_parallel
from nemo_mapo.rewards.judged import RewardsUnavailable
from nemo_mapo.rollout.protocol import RolloutUnavailable
from nemo_mapo.rows import Group, completions_of
from nemo_mapo.training.actor import MapoActor
from nemo_mapo.training.checkpoint import CheckpointStore
from nemo_mapo.training.dynamic_sampling import RefillingPromptStream
from nemo_mapo.training.early_signs import EarlySigns
from nemo_mapo.training.loop import TrainingLoop, Validator
from nemo_mapo.training.optimizer import PolicyOptimizer
from nemo_mapo.training.prompts import PromptStream
from nemo_mapo.training.samples import SampleWriter
from nemo_mapo.training.scoring import RolloutScorer, ScoredRollouts, agreement
from nemo_mapo.training.sources import build_source
from nemo_mapo.types import reduced

logger = logging.getLogger(__name__)


class MapoTrainer(TrainingLoop):
    """Generates, scores, optimises; the random numbers of sampling are determined by seed, step and row."""

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
        if config.trainer.mapo.generation.type == "dynamic_sampling":
            prompts = RefillingPromptStream(prompts)
        super().__init__(config, actor.policy, optimizer, prompts, validate, logger, checkpoints, run_timer)
        self.samples = samples
        self.source = build_source(config, prompts, actor, scorer, self.timer, steps=self.max_steps)
        self.signs = EarlySigns(config)

    def next_step(self) -> dict[str, float]:
        """Take a step; if rewards or rollouts are unavailable, save the state before it and raise the error again."""
        before = self.state_dict()
        try:
            return self.train_step()
        except (RewardsUnavailable, RolloutUnavailable):
            if self.cfg.save_interval > 0:
                self.checkpoints.save(self.step, self.actor.policy, self.optimizer, before)
            raise

    def train_step(self) -> dict[str, float]:
        """Take a batch of groups, score it, and take its optimiser steps."""
        started = time.perf_counter()
        self.policy.eval()
        with torch.no_grad():
            drawn = self.source.next(self.step, version=self.optimization_step)
        staleness, generated = self._staleness(drawn.groups), sum(gather_over_data_parallel(drawn.tokens))
        scored = self.scorer(drawn.groups, self.actor, self.timer, drawn.rewards)
        self.actor.finish_inference()
        with self.timer("train"):
            metrics = self.run_training(scored)
        self.step += 1
        self.consumed_samples += drawn.sampled
        if is_main_rank():
            self.samples.write_training(self.step, drawn.groups[0], scored)
        agreed = agreement(scored.signals, completions_of(drawn.groups))
        metrics |= reduced(gather_over_data_parallel(scored.metrics | agreed)) | self.timings() | drawn.metrics
        metrics["timing/step_seconds"] = time.perf_counter() - started
        # Generation ahead takes as long as the step, of which the trainer waits only a small part.
        seconds = metrics["timing/step_seconds" if self.config.ahead else "timing/rollout_seconds"]
        metrics["rollout/tokens_per_second"] = generated / seconds
        metrics["rollout/staleness"] = staleness
        self._warn_of_mismatch(metrics["rollout/log_prob_mismatch"])
        self.signs.watch(metrics)
        return metrics

    def _warn_of_mismatch(self, nats: float) -> None:
        limit = self.config.rollout.log_prob_alarm
        if nats > limit:
            logger.warning(
                f"step {self.step}: log-probs of the rollout engine and of training differ by {nats:.3g} nats per "
                f"token on average, more than rollout.log_prob_alarm={limit:g}"
            )

    def _staleness(self, groups: Sequence[Group]) -> float:
        """Rollout batches that the weights sampled from are behind the present ones."""
        version = groups[0].completions[0].weight_version
        behind = (self.optimization_step - version) / self.config.steps_per_generation
        assert 0 <= behind <= self.config.ahead, f"version {version} is {behind} batches old"
        return behind

    @contextmanager
    def cleaned_up(self) -> Iterator[None]:
        """However the loop ends, send no further requests to servers."""
        try:
            yield
        finally:
            self.source.close()

    def run_training(self, scored: ScoredRollouts) -> dict[str, float]:
        """Take the optimiser steps of one rollout batch; returns metrics averaged over them.

        Raises:
            FloatingPointError: naming a bad tensor, after `max_skipped_steps` steps in a row that were not finite.
        """
        history: list[dict[str, float]] = []
        for number, rows in enumerate(scored.in_steps(self.config.steps_per_generation)):
            self.optimizer.zero_grad()
            passed = self.actor.training_pass(rows)
            if number == 0:
                scored.first_step_read(passed.signals)
            history.append(passed.metrics | self.update(passed.loss))
        self.optimizer.zero_grad()
        return reduced(history)

    def validated(self) -> None:
        """Show the last group of completions to the loggers."""
        if is_main_rank():
            self.samples.log_table(self.logger, self.step)

    def facts(self) -> dict[str, Any]:
        """Which part-of-speech tagger gates the masks."""
        return {"pos_tagger": self.scorer.tagger.name}

    def state_dict(self) -> dict[str, Any]:
        """Everything but weights and optimiser state; the data position is that of the source."""
        return super().state_dict() | self.source.state_dict() | {"pos_tagger": self.scorer.tagger.name}

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
