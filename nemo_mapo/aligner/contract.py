"""What NeMo-Aligner's trainers ask of an actor and give to a loop, for a NeMo that it does not run with.

`tests/unit/test_aligner.py` holds these against NeMo-Aligner's own, if that is installed.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from nemo_mapo.ranks import from_main_rank


class AlignableGenerativeInterface(ABC):
    """An actor that is trained by reinforcement learning: inference, loss and gradient."""

    @abstractmethod
    def get_loss_and_metrics(self, batch: Any, forward_only: bool) -> Any:
        """Loss and metrics of one optimiser step, the same on every rank; gradients too unless `forward_only`."""

    @abstractmethod
    def prepare_for_training_step(self) -> None:
        """Before each optimiser step."""

    @abstractmethod
    def finish_training_step(self) -> None:
        """After the gradients of each optimiser step."""

    @abstractmethod
    def prepare_for_inference(self) -> None:
        """Before generation."""

    @abstractmethod
    def finish_inference(self) -> None:
        """After generation."""

    @abstractmethod
    def infer(self, *args: Any, **kwargs: Any) -> Any:
        """Generate."""

    @abstractmethod
    def prepare_for_training(self) -> None:
        """Before the optimiser steps of a rollout batch."""

    @abstractmethod
    def finish_training(self) -> None:
        """After the optimiser steps of a rollout batch."""

    def prepare_for_validation_step(self) -> None:
        """Before validation."""
        raise NotImplementedError

    def finish_validation_step(self) -> None:
        """After validation."""
        raise NotImplementedError

    # Not abstract, as upstream: trainers call it only if they need the frozen reference.
    def get_init_policy_logprobs(self, rollout_batches: Any) -> Any:  # noqa: B027
        """Log-probs of the frozen start."""


class Timer:
    """The time limit of a run, `DD:HH:MM:SS` or None for no limit; rank 0 decides for all."""

    def __init__(self, duration: str | None) -> None:
        self.duration = duration
        self._seconds = float("inf")
        if duration is not None:
            days, hours, minutes, seconds = map(int, duration.strip().split(":"))
            self._seconds = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()

    def start_time(self) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def get_time_elapsed(self) -> float:
        """Seconds since `start_time`."""
        return time.monotonic() - self._started

    def get_time_remaining(self) -> float:
        """Seconds to the limit; negative past it."""
        return self._seconds - self.get_time_elapsed()

    def is_finished(self) -> bool:
        """Whether rank 0 is past the limit; the same answer on every rank, all of which must ask."""
        return from_main_rank(self.get_time_remaining() <= 0)


class ScopedTimer:
    """Seconds of named sections.

        timer = ScopedTimer(reduction="mean", sync_cuda=False, buffer_size=1)
        with timer("rollout"): ...
        timer.consume_durations()  # {"rollout": 0.8}

    Args:
        reduction: `mean`, the only one; kept for NeMo-Aligner's signature.
        sync_cuda: wait for the GPU before the clock is read.
        buffer_size: 1, the only size; kept likewise.

    Raises:
        ValueError: for a section that is timed again before `consume_durations`, or another reduction or buffer.
    """

    def __init__(self, reduction: str = "mean", sync_cuda: bool = True, buffer_size: int = 1) -> None:
        if reduction != "mean" or buffer_size != 1:
            raise ValueError(f"reduction={reduction!r}, buffer_size={buffer_size}: only 'mean' over 1 is kept")
        self._sync = sync_cuda
        self._durations: dict[str, float] = {}

    def consume_durations(self) -> dict[str, float]:
        """Seconds by section, which are then forgotten."""
        durations, self._durations = self._durations, {}
        return durations

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a section."""
        started = self._now()
        try:
            yield
        finally:
            seconds = self._now() - started
            if name in self._durations:
                raise ValueError(f"{name} was timed before and not consumed; call consume_durations() first")
            self._durations[name] = seconds

    def _now(self) -> float:
        if self._sync:
            torch.cuda.synchronize()
        return time.monotonic()


class CustomLoggerWrapper:
    """Several Lightning loggers as one; a method that a logger does not have is not called on it."""

    def __init__(self, loggers: Sequence[Any]) -> None:
        self.loggers = list(loggers)

    def apply_fn(self, name: str, /, *args: Any, **kwargs: Any) -> None:
        """Call the method of this name on each logger that has it."""
        for logger in self.loggers:
            method = getattr(logger, name, None)
            if method is not None:
                method(*args, **kwargs)

    def log_hyperparams(self, params: Any) -> None:
        """Log the config."""
        self.apply_fn("log_hyperparams", params)

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        """Log a table."""
        self.apply_fn("log_table", *args, **kwargs)

    def log_image(self, *args: Any, **kwargs: Any) -> None:
        """Log an image."""
        self.apply_fn("log_image", *args, **kwargs)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None, prefix: str = "") -> None:
        """Log numbers under `prefix` + their names."""
        self.apply_fn("log_metrics", {f"{prefix}{name}": value for name, value in metrics.items()}, step)

    def finalize(self) -> None:
        """Close the loggers of a run that ended well."""
        self.apply_fn("finalize", "success")


def check_progress(
    step: int,
    max_steps: int,
    val_check_interval: int,
    save_interval: int,
    limit_val_batches: float | None,
    run_time_exceeded: bool = False,
) -> tuple[bool, bool, bool]:
    """Whether to validate, to save, and whether `step` is the last one.

    Intervals of 0 (or below, for saving) switch off; the last step, and one past the time limit, do both.

        check_progress(20, 80, 20, 40, limit_val_batches=1.0)  # (True, False, False)

    Raises:
        AssertionError: if steps are validated and `save_interval` is not a multiple of `val_check_interval`.
    """
    validates = limit_val_batches != 0 and val_check_interval > 0
    last = step == max_steps
    if validates:
        assert save_interval % val_check_interval == 0, f"{save_interval=} must be divisible by {val_check_interval=}"
    ending = last or run_time_exceeded
    validate = validates and (ending or _is_multiple(step, val_check_interval))
    save = save_interval > 0 and (ending or _is_multiple(step, save_interval))
    return validate, save, last


def _is_multiple(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
