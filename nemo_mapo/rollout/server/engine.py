"""The one thread that owns the backend: it batches what waits, generates, and changes weights between two batches."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.rollout.protocol import RolloutBackend
from nemo_mapo.rollout.weight_sync import Weights
from nemo_mapo.types import AudioBatch, Example, FinishReason, PromptBatch, Rollouts

logger = logging.getLogger(__name__)

EngineState = Literal["serving", "no weights", "stopped"]


class EngineFull(RuntimeError):
    """More completions wait than are allowed to."""


class NotServing(RuntimeError):
    """There are no whole weights to sample from, or the engine has stopped."""


class OtherVersion(RuntimeError):
    """The weights are not those that the request asks for."""


class TooLate(RuntimeError):
    """The request's time had run out before the engine came to it."""


@dataclass(frozen=True, kw_only=True)
class WeightId:
    """Which weights: the trainer's number, and a digest that no other weights have."""

    version: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One completion."""

    token_ids: tuple[int, ...]
    """With the stop token."""
    text: str
    finish_reason: FinishReason
    log_probs: tuple[float, ...]
    """Under the unmodified model, nats."""
    sampling_log_probs: tuple[float, ...]
    """Under the distribution sampled from, nats."""
    weights: WeightId


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One prompt and the completions wanted of it."""

    token_ids: tuple[int, ...]
    waveform: Float[Tensor, " samples"] | None
    sampling: SamplingConfig
    seeds: tuple[int, ...]
    weights: WeightId | None
    """None takes any weights."""
    deadline: float
    """By time.monotonic()."""
    done: "Future[list[Generated]]" = field(default_factory=Future)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Change:
    weights: Weights
    done: "Future[WeightId]" = field(default_factory=Future)


class RolloutEngine:
    """Serves jobs in their order; those that can share a batch do.

    Weights change between two batches, so a completion comes from one version. After a change that failed in the
    middle nothing is served until one succeeds.
    """

    def __init__(
        self,
        backend: RolloutBackend,
        *,
        pad_id: int,
        batch_size: int,
        max_waiting: int,
        batching_seconds: float,
        weights: WeightId | None,
    ) -> None:
        """`weights` names those that the backend has now; None serves nothing before the first update."""
        self.backend = backend
        self.weights = weights
        self.generated_tokens = 0
        self.generated_completions = 0
        self.busy_seconds = 0.0
        self.updates = {"taken": 0, "failed": 0}
        self._pad_id = pad_id
        self._batch_size = batch_size
        self._max_waiting = max_waiting
        self._batching_seconds = batching_seconds
        self._waiting: deque[Job | _Change] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="rollout-engine", daemon=True)
        self._thread.start()

    @property
    def state(self) -> EngineState:
        """Whether jobs are served."""
        if self._stopping or not self._thread.is_alive():
            return "stopped"
        return "no weights" if self.weights is None else "serving"

    @property
    def waiting(self) -> int:
        """Completions that wait."""
        with self._changed:
            return self._count_waiting()

    def submit(self, job: Job) -> "Future[list[Generated]]":
        """Have a job done; the future raises NotServing, OtherVersion, TooLate, or what the backend raises.

        Raises:
            EngineFull: too many completions wait.
            NotServing: the engine has stopped or has no weights.
        """
        with self._changed:
            if self.state != "serving":
                raise NotServing(self.state)
            if self._count_waiting() + len(job.seeds) > self._max_waiting:
                raise EngineFull(f"{self._count_waiting()} completions are waiting")
            self._waiting.append(job)
            self._changed.notify()
        return job.done

    def change_weights(self, weights: Weights) -> "Future[WeightId]":
        """Have the weights changed after the jobs that wait; the future raises what the backend raises."""
        change = _Change(weights=weights)
        with self._changed:
            if self.state == "stopped":
                raise NotServing(self.state)
            self._waiting.append(change)
            self._changed.notify()
        return change.done

    def stop(self) -> None:
        """End after the batch in progress; what still waits fails with NotServing."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _count_waiting(self) -> int:
        return sum(len(job.seeds) for job in self._waiting if isinstance(job, Job))

    def _work(self) -> None:
        try:
            while (work := self._next()) is not None:
                if isinstance(work, _Change):
                    self._change(work)
                else:
                    self._serve(work)
        finally:
            self._stopping = True
            for left in self._waiting:
                _fail(left, NotServing("stopped"))

    def _next(self) -> "list[Job] | _Change | None":
        """Wait for work: a change of weights, or the jobs of one batch; None when the engine is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            if self._stopping:
                return None
            first = self._waiting[0]
            if isinstance(first, _Change):
                self._waiting.popleft()
                return first
            full = max(self._batch_size // len(first.seeds), 1)
            until = time.monotonic() + self._batching_seconds
            while len(batch := self._alike(first)) < full and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            batch = batch[:full]
            for job in batch:
                self._waiting.remove(job)
            return batch

    def _alike(self, first: Job) -> list[Job]:
        """Waiting jobs that can share a batch with the first one; none is taken past a change of weights."""
        found = []
        for job in self._waiting:
            if isinstance(job, _Change):
                break
            if job.sampling == first.sampling and len(job.seeds) == len(first.seeds):
                found.append(job)
        return found

    def _change(self, change: _Change) -> None:
        weights = change.weights
        before, self.weights = self.weights, None
        try:
            self.backend.update_weights(weights.version, weights.tensors.items())
        except ValueError as error:
            # Refused before anything was touched: the old weights are whole.
            self.weights = before
            self.updates["failed"] += 1
            change.done.set_exception(error)
        # Whatever happened is told to the trainer; nothing is served from weights that may be mixed.
        except Exception as error:
            logger.exception("a change of weights failed in the middle; nothing is served until one succeeds")
            self.updates["failed"] += 1
            change.done.set_exception(error)
        else:
            self.weights = WeightId(version=weights.version, digest=weights.digest)
            self.updates["taken"] += 1
            change.done.set_result(self.weights)

    def _serve(self, batch: Sequence[Job]) -> None:
        jobs = [job for job in batch if self._may_start(job)]
        if not jobs:
            return
        started = time.monotonic()
        seeds = torch.tensor([seed for job in jobs for seed in job.seeds], dtype=torch.int64)
        try:
            rollouts = self.backend.generate(
                prompt_batch(jobs, self._pad_id), jobs[0].sampling, group_size=len(jobs[0].seeds), seeds=seeds
            )
        # Whatever happened is told to those who wait.
        except Exception as error:
            logger.exception("a batch failed")
            for job in jobs:
                _fail(job, error)
            return
        assert self.weights is not None
        completions = completions_of(rollouts, self.weights)
        self.busy_seconds += time.monotonic() - started
        self.generated_completions += len(completions)
        self.generated_tokens += sum(len(completion.token_ids) for completion in completions)
        group = len(jobs[0].seeds)
        for number, job in enumerate(jobs):
            job.done.set_result(completions[number * group : (number + 1) * group])

    def _may_start(self, job: Job) -> bool:
        """Whether the job is to be generated now; else it is told why not."""
        if self.weights is None:
            _fail(job, NotServing("no weights"))
        elif job.weights is not None and job.weights != self.weights:
            _fail(job, OtherVersion(f"version {self.weights.version} ({self.weights.digest[:12]}) is served"))
        elif time.monotonic() > job.deadline:
            _fail(job, TooLate("the request waited too long"))
        else:
            # False where whoever asked has gone.
            return job.done.set_running_or_notify_cancel()
        return False


def prompt_batch(jobs: Sequence[Job], pad_id: int) -> PromptBatch:
    """The prompts of some jobs, one row each."""
    with_audio = [number for number, job in enumerate(jobs) if job.waveform is not None]
    clips = [job.waveform for job in jobs if job.waveform is not None]
    return PromptBatch(
        tokens=pad_sequence([torch.tensor(job.token_ids) for job in jobs], batch_first=True, padding_value=pad_id),
        lengths=torch.tensor([len(job.token_ids) for job in jobs]),
        audio=AudioBatch(
            waveforms=pad_sequence(clips, batch_first=True) if clips else torch.zeros(0, 0),
            lengths=torch.tensor([len(clip) for clip in clips], dtype=torch.int64),
        ),
        audio_row=torch.tensor([with_audio.index(row) if row in with_audio else -1 for row in range(len(jobs))]),
        examples=tuple(
            Example(id=f"request {number}", question="", choices=(), answer="", task="") for number in range(len(jobs))
        ),
    )


def completions_of(rollouts: Rollouts, weights: WeightId) -> list[Generated]:
    """The rows of `rollouts` without their padding."""
    rows = zip(
        rollouts.completions.tolist(),
        rollouts.log_probs.tolist(),
        rollouts.sampling_log_probs.tolist(),
        rollouts.completion_lengths.tolist(),
        strict=True,
    )
    return [
        Generated(
            token_ids=tuple(ids[:length]),
            text=rollouts.texts[row],
            finish_reason=rollouts.finish_reasons[row],
            log_probs=tuple(log_probs[:length]),
            sampling_log_probs=tuple(sampling_log_probs[:length]),
            weights=weights,
        )
        for row, (ids, log_probs, sampling_log_probs, length) in enumerate(rows)
    ]


def _fail(work: Job | _Change, error: Exception) -> None:
    """Tell whoever asked, if still there."""
    try:
        work.done.set_exception(error)
    except InvalidStateError:
        logger.debug("a request had been given up before it failed")
