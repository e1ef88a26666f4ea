"""NeMo-Aligner's actor interface and loop utilities, for versions of NeMo that NeMo-Aligner does not support.

`tests/unit/test_aligner.py` compares these with NeMo-Aligner's own, if that is installed.
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
        """Called before each optimiser step."""

    @abstractmethod
    def finish_training_step(self) -> None:
        """Called when the gradients of an optimiser step are ready."""

    @abstractmethod
    def prepare_for_inference(self) -> None:
        """Called before generation."""

    @abstractmethod
    def finish_inference(self) -> None:
        """Called after generation."""

    @abstractmethod
    def infer(self, *args: Any, **kwargs: Any) -> Any:
        """Generate completions."""

    @abstractmethod
    def prepare_for_training(self) -> None:
        """Called before the optimiser steps of a rollout batch."""

    @abstractmethod
    def finish_training(self) -> None:
        """Called after the optimiser steps of a rollout batch."""

    def prepare_for_validation_step(self) -> None:
        """Called before validation."""
        raise NotImplementedError

    def finish_validation_step(self) -> None:
        """Called after validation."""
        raise NotImplementedError

    # Not abstract, as upstream: trainers call it only if they need the frozen reference.
    def get_init_policy_logprobs(self, rollout_batches: Any) -> Any:  # noqa: B027
        """Log-probs under the frozen start policy."""


class Timer:
    """The time limit of a run, `DD:HH:MM:SS` or None for no limit; rank 0's clock counts."""

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
        """Whether rank 0 is past the limit; all ranks must call it, and get the same answer."""
        return from_main_rank(self.get_time_remaining() <= 0)


class ScopedTimer:
    """Measures the seconds that named sections take.

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
        """Return the seconds by section and forget them."""
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
    """Several Lightning loggers as one; loggers without a method are skipped when it is called."""

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
        """Close the loggers after a successful run."""
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

    An interval of 0 (for saving, also a negative one) switches it off; the last step, and one past the time limit, do
    both.

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
