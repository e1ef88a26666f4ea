"""Supervised training on a run's own manifests: the loop that precedes MAPO, in the same run directory."""

import time

from megatron.core.distributed import DistributedDataParallel

from nemo_mapo.aligner import CustomLoggerWrapper, Timer
from nemo_mapo.config.run import RunConfig
from nemo_mapo.data.dataset import PromptLoader, rows_of_split
from nemo_mapo.models.layout import MicroBatching, in_parts
from nemo_mapo.ranks import data_parallel_prompts
from nemo_mapo.training.checkpoint import CheckpointStore
from nemo_mapo.training.loop import TrainingLoop, Validator
from nemo_mapo.training.optimizer import PolicyOptimizer
from nemo_mapo.training.prompts import PromptStream
from nemo_mapo.training.supervised import supervised_gradient
from nemo_mapo.training.targets import TargetRows, hide_clips
from nemo_mapo.types import reduced


class SftTrainer(TrainingLoop):
    """Learns the targets of the training split, batch after batch."""

    name = "SFT"

    def __init__(
        self,
        config: RunConfig,
        wrapped: DistributedDataParallel,
        targets: TargetRows,
        optimizer: PolicyOptimizer,
        prompts: PromptStream,
        validate: Validator,
        logger: CustomLoggerWrapper,
        checkpoints: CheckpointStore,
        run_timer: Timer,
    ) -> None:
        """Train the model in `wrapped`; `targets` gives the target of each prompt."""
        super().__init__(config, wrapped.module, optimizer, prompts, validate, logger, checkpoints, run_timer)
        self.wrapped = wrapped
        self.targets = targets
        self.batching = MicroBatching.of(config.model)

    def next_step(self) -> dict[str, float]:
        """Learn the next batch of the training split."""
        started = time.perf_counter()
        with self.timer("data"):
            places = data_parallel_prompts(self.prompts.batch_size, self.config.steps_per_generation)
            rows = self.targets(next(self.prompts))
            rows = hide_clips(rows, places, self.prompts.batch_size, self.targets.config, self.targets.special)
        history: list[dict[str, float]] = []
        self.policy.train()
        rows_per_step = len(places) // self.config.steps_per_generation
        with self.timer("train"):
            for part in in_parts(rows, rows_per_step):
                self.optimizer.zero_grad()
                metrics = supervised_gradient(self.wrapped, part, self.batching)
                history.append(metrics | self.update(metrics["train/loss"]))
            self.optimizer.zero_grad()
        self.step += 1
        self.consumed_samples += self.prompts.batch_size
        metrics = reduced(history) | self.prompts.metrics() | self.timings()
        metrics["timing/step_seconds"] = time.perf_counter() - started
        return metrics

    def validated(self) -> None:
        """Nothing is sampled in training; the validation's own completions are in rollouts.jsonl."""

    def shown(self, metrics: dict[str, float]) -> dict[str, str]:
        """Loss and speed."""
        speed = metrics["train/target_tokens"] / metrics["timing/step_seconds"]
        return {"loss": f"{metrics['train/loss']:.3f}", "tok/s": f"{speed:.0f}"}


def check_targets(
    split: PromptLoader,
    targets: TargetRows,
    config: RunConfig,
    *,
    limit: int | None,
    name: str,
) -> None:
    """Write every target of a split (or of `limit` cuts) once, without reading audio.

    Raises:
        ValueError: naming cut and remedy: a target cannot be written, is longer than validation would generate, or does
            not fit the positions or the token budget together with its prompt.
    """
    generated, positions = config.rollout.sampling.max_new_tokens, config.model.decoder.max_position_embeddings
    for example, prompt in rows_of_split(split, limit=limit):
        target = len(targets.ids(example, prompt))
        row = len(prompt) + target
        for what, tokens, most, key in (
            ("target", target, generated, "rollout.sampling.max_new_tokens"),
            ("prompt with its target", row, positions, "model.decoder.max_position_embeddings"),
            ("prompt with its target", row, config.model.packed_tokens or row, "model.packed_tokens"),
        ):
            if tokens > most:
                raise ValueError(f"{name}: the {what} of {example.id} has {tokens} tokens, more than {key}={most}")
