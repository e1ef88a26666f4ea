"""Assembles a supervised run: the same host, data, run directory and report as a MAPO run, with another loop."""

from collections.abc import Sequence
from pathlib import Path

from nemo_mapo.aligner import CustomLoggerWrapper, Timer
from nemo_mapo.config.run import RunConfig
from nemo_mapo.evaluation.evaluate import test_summary
from nemo_mapo.launch import Assembly, experiment_loggers, run, splits_of
from nemo_mapo.platform import on_cpu_host
from nemo_mapo.ranks import any_rank
from nemo_mapo.rows import Problem, Row
from nemo_mapo.training.checkpoint import CheckpointStore, write_checkpoint
from nemo_mapo.training.early_signs import warn_below_chance
from nemo_mapo.training.loop import TrainingLoop
from nemo_mapo.training.optimizer import build_optimizer, wrap_data_parallel
from nemo_mapo.training.policies import merged_policy, prepare_for_targets
from nemo_mapo.training.references import FrozenReference
from nemo_mapo.training.sft import SftTrainer, check_targets
from nemo_mapo.training.supervised import mean_negative_log_likelihood
from nemo_mapo.training.targets import TargetRows

MERGED = "merged"
"""Subdirectory in which a run with adapters leaves its last policy, merged, as a checkpoint to start from."""


def run_sft(config: RunConfig) -> Path:
    """Train on targets as `config` says; otherwise like `launch.run`."""
    return run(config, SupervisedAssembly)


class SupervisedAssembly(Assembly):
    """A run that learns `data.target` of its manifests."""

    supervised = True

    def test(self) -> dict[str, float]:
        """Loss, and accuracy of greedy decoding if there are choices, on the test split."""
        assert self.config.data.test_ds is not None
        evaluator = self._evaluator(self.config.data.test_ds, detailed=True)
        loss = {"loss": self._loss(evaluator.batches)}
        if not _all_have_choices(evaluator.batches):
            return loss
        after = evaluator(self.policy, self._backend(self.policy), step=self.trainer.step, split="test")
        self.directory.profiles.append([after.profile.record(self.trainer.step, "after")])
        return loss | test_summary(None, after)

    def validate(self, step: int) -> dict[str, float]:
        """Loss, and greedy decoding if every question of the validation split has choices."""
        batches = self.validator.batches
        loss = {"val/loss": self._loss(batches)}
        if not _all_have_choices(batches):
            return loss
        found = self._answer_validation(step)
        if step > 0:
            right = round(found.accuracy * found.samples)
            warn_below_chance(right, found.samples, chance=found.chance, step=step)
        return loss | found.metrics()

    def finish(self) -> None:
        """Merge adapters into a checkpoint that another run can start from."""
        if self.config.model.lora is not None:
            merged = merged_policy(self.policy, self.config, self.tokenizer)
            write_checkpoint(self.directory.path / MERGED, merged)

    def _loss(self, batches: Sequence[list[Problem]]) -> float:
        was_training = self.policy.training
        self.policy.eval()
        rows: list[list[Row]] = [self._targets(problems) for problems in batches]
        loss = mean_negative_log_likelihood(self.policy, rows, self.batching)
        self.policy.train(was_training)
        return loss

    @property
    def _targets(self) -> TargetRows:
        return TargetRows(self.config.data.target, self.config.rewards.template, self.tokenizer)

    def _check_positions(self) -> None:
        for name, split in splits_of(self.config):
            check_targets(
                self._dataloader(self.finite(split)),
                self._targets,
                self.config,
                limit=None if split.check_cuts is None else split.check_cuts * split.num_sources,
                name=f"data.{name}",
            )
        super()._check_positions()

    def _reference(self) -> FrozenReference:
        return prepare_for_targets(self.policy, self.config, self.tokenizer, batching=self.batching)

    def _build_trainer(self) -> TrainingLoop:
        config = self.config
        wrapped = wrap_data_parallel(self.policy, distributed_optimizer=not on_cpu_host())
        return SftTrainer(
            config,
            wrapped,
            self._targets,
            build_optimizer(wrapped, config.model.optim),
            self._prompt_stream(config.data.train_ds),
            self.validate,
            CustomLoggerWrapper(experiment_loggers(config, self.directory)),
            CheckpointStore.of(config, self.directory.checkpoints),
            Timer(config.trainer.loop.max_time_per_run),
        )


def _all_have_choices(batches: Sequence[list[Problem]]) -> bool:
    """Whether every question has choices, over the batches of all ranks; the same answer on each."""
    return not any_rank(any(not problem.example.choices for problems in batches for problem in problems))
