"""The training loop that MAPO and SFT share: steps, validation, log, checkpoints, at NeMo-Aligner's intervals."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from nemo_mapo.aligner import CustomLoggerWrapper, ScopedTimer, Timer, check_progress
from nemo_mapo.config.run import RunConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.processes import is_main_rank
from nemo_mapo.ranks import any_rank
from nemo_mapo.training.checkpoint import VALIDATION, Checkpoint, CheckpointStore, load_checkpoint, step_name
from nemo_mapo.training.optimizer import PolicyOptimizer, SkippedSteps, learning_rate
from nemo_mapo.training.prompts import PromptStream, check_counts, total_steps
from nemo_mapo.training.termination import termination_request

Validator = Callable[[int], dict[str, float]]


class TrainingLoop(ABC):
    """Runs all steps; a run that is killed at any point and resumed ends with the weights of an uninterrupted one.

    Everything that decides a step (weights, optimiser, schedule, data position, step) is in the checkpoint.
    """

    name: ClassVar[str]
    """Its name in the progress bar."""

    def __init__(
        self,
        config: RunConfig,
        policy: AudioLLM,
        optimizer: PolicyOptimizer,
        prompts: PromptStream,
        validate: Validator,
        logger: CustomLoggerWrapper,
        checkpoints: CheckpointStore,
        run_timer: Timer,
    ) -> None:
        self.config = config
        self.cfg = config.trainer.loop
        self.policy = policy
        self.optimizer = optimizer
        self.prompts = prompts
        self.validate = validate
        self.logger = logger
        self.checkpoints = checkpoints
        self.run_timer = run_timer
        self.step = 0
        self.optimization_step = 0
        self.consumed_samples = 0
        self.skipped = SkippedSteps(
            limit=self.cfg.max_skipped_steps, key=f"{config.trainer.loop_name}.max_skipped_steps"
        )
        self.max_steps = total_steps(config, prompts)
        self.total_optimizer_steps = self.max_steps * config.steps_per_generation
        self.timer = ScopedTimer(reduction="mean", sync_cuda=torch.cuda.is_available(), buffer_size=1)

    @abstractmethod
    def next_step(self) -> dict[str, float]:
        """Take the next step; returns its metrics."""

    @abstractmethod
    def shown(self, metrics: dict[str, float]) -> dict[str, str]:
        """Values of a step in the progress bar."""

    def fit(self) -> bool:
        """Train to the last step; True if it was reached, False if time or a signal ended the run earlier.

        Either way the state is saved (unless save_interval is 0) and a later run can resume.
        """
        self.run_timer.start_time()
        with termination_request(self._interrupted()) as termination_requested, self.cleaned_up():
            if self.step == 0 and self.cfg.val_check_interval > 0:
                validation = self.validate(0)
                # Better to find a missing metric before hours of training.
                self.config.exp_manager.checkpoint_callback_params.score(validation)
                self.logger.log_metrics(validation, step=self.step)
            with self._progress_bar() as bar:
                while self.step < self.max_steps:
                    metrics = self.next_step()
                    bar.set_postfix(self.shown(metrics), refresh=False)
                    bar.update()
                    if self._finish_step(metrics, termination_requested):
                        break
        self.logger.finalize()
        return self.step == self.max_steps

    def _interrupted(self) -> str:
        kept = "its state is saved" if self.cfg.save_interval > 0 else "nothing is saved (save_interval=0)"
        return f"Ctrl-C: the run ends after the step in progress, {kept}; once more ends it at once"

    @contextmanager
    def cleaned_up(self) -> Iterator[None]:
        """Clean up, however the loop ends."""
        yield

    @abstractmethod
    def validated(self) -> None:
        """Called after each validation during training, before its metrics are logged."""

    def facts(self) -> dict[str, Any]:
        """Entries of run.json for this kind of run."""
        return {}

    def update(self, loss: float) -> dict[str, float]:
        """One optimiser step on the accumulated gradient of `loss`; returns its metrics.

        Raises:
            FloatingPointError: naming a bad tensor, after `max_skipped_steps` steps in a row that were not finite.
        """
        lr = learning_rate(self.config.model.optim, self.optimization_step, self.total_optimizer_steps)
        taken = self.optimizer.step(lr=lr, max_norm=self.cfg.gradient_clip_val)
        self.skipped.count(taken, loss, step=self.step)
        self.optimization_step += 1
        return {
            "train/grad_norm": taken.grad_norm,
            "train/lr": lr,
            "train/skipped_steps": float(taken.fault is not None),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything but weights and optimiser state."""
        return {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "optimization_step": self.optimization_step,
            "epoch": self.prompts.epoch,
            "prompts": self.prompts.state_dict(),
            "skipped_in_a_row": self.skipped.in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; ValueError if it is invalid, or the run is past its last step."""
        check_counts(state, ("step", "consumed_samples", "optimization_step", "skipped_in_a_row"))
        if state["step"] > self.max_steps:
            raise ValueError(
                f"the checkpoint is at step {state['step']}, beyond {self.config.trainer.loop_name}.max_steps="
                f"{self.max_steps}; raise it, or start a new run directory"
            )
        self.step = state["step"]
        self.consumed_samples = state["consumed_samples"]
        self.optimization_step = state["optimization_step"]
        self.prompts.load_state_dict(state["prompts"])
        self.skipped.in_a_row = state["skipped_in_a_row"]

    def resume(self, checkpoint: Checkpoint) -> None:
        """Load weights, optimiser and state of a checkpoint of `newest_undamaged`.

        Raises:
            ValueError: its trainer_state.json is inconsistent.
        """
        path, state = checkpoint.path, checkpoint.state
        if missing := sorted(self.state_dict().keys() - state.keys()):
            raise ValueError(f"{path}: trainer_state.json lacks {', '.join(missing)}")
        if path.name != step_name(state["step"]):
            raise ValueError(f"{path}: trainer_state.json says step={state['step']!r}, which is not this checkpoint's")
        self.config.exp_manager.checkpoint_callback_params.score(state.get(VALIDATION, {}))
        load_checkpoint(path, self.policy, optimizer=self.optimizer, undamaged=True)
        self.load_state_dict(state)

    def save(self, validation: Mapping[str, float] | None = None) -> None:
        """Write a checkpoint of the present step, whose validation gave these metrics."""
        self.checkpoints.save(self.step, self.policy, self.optimizer, self.state_dict(), validation)

    def _finish_step(self, metrics: dict[str, float], termination_requested: Callable[[], bool]) -> bool:
        """Validate, log and save as due; True if the run has to end here."""
        out_of_time = self.run_timer.is_finished()
        validate, save, _ = check_progress(
            self.step,
            self.max_steps,
            self.cfg.val_check_interval,
            self.cfg.save_interval,
            1.0,
            run_time_exceeded=out_of_time,
        )
        validation: dict[str, float] = {}
        if validate:
            with self.timer("validation"):
                validation = self.validate(self.step)
            metrics |= validation | self.timings()
            self.validated()
        self.logger.log_metrics(metrics, step=self.step)
        # A signal may reach the ranks at different steps; they have to end at the same one.
        stop_now = any_rank(termination_requested())
        if save or (stop_now and self.cfg.save_interval > 0):
            self.save(validation)
        return stop_now or out_of_time

    def timings(self) -> dict[str, float]:
        """Seconds of each timed part since the last call."""
        return {f"timing/{name}_seconds": seconds for name, seconds in self.timer.consume_durations().items()}

    def _progress_bar(self) -> "tqdm[None]":
        hidden = not is_main_rank()
        return tqdm(
            total=self.max_steps, initial=self.step, desc=self.name, unit="step", dynamic_ncols=True, disable=hidden
        )
