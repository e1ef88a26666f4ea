"""Rollouts from servers over HTTP: retries, failover, and weights that are the ones asked for."""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Final

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.rollout import RolloutServerConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.data.tokenizer import SpecialTokens, completion_text
from nemo_mapo.models.pipeline import any_rank
from nemo_mapo.rollout.adapters import BadAnswer, Body, Completion, PromptRow, Wanted, adapter_of, check_completions
from nemo_mapo.rollout.client_http import Refused, RolloutUnavailable, ServerConnection, Unreachable
from nemo_mapo.rollout.client_weights import WeightSender
from nemo_mapo.rollout.protocol import Capabilities, PendingRollouts
from nemo_mapo.types import PromptBatch, Rollouts

logger = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS: Final = 30.0


class ServerRollout:
    """A `RolloutBackend` on servers.

    Each prompt is a request. One that fails is sent again, to the next server, after a growing pause; when it has
    failed `max_attempts` times, RolloutUnavailable ends the call, and nothing of it is returned.
    """

    def __init__(
        self, config: RolloutServerConfig, tokenizer: PreTrainedTokenizerBase, *, sample_rate: int, token: str | None
    ) -> None:
        """Look at the servers: RolloutUnavailable when none answers, ValueError when one refuses the token."""
        self.config = config
        self.tokenizer = tokenizer
        self.sample_rate = sample_rate
        self.adapter = adapter_of(config, tokenizer)
        timeout = config.timeout_seconds
        self.servers = [ServerConnection(url, token=token, timeout_seconds=timeout) for url in config.urls]
        self.sender = WeightSender(config, self.servers)
        self._special = SpecialTokens.from_tokenizer(tokenizer)
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._version = 0
        self._digest: str | None = None
        self._usable = set(range(len(self.servers)))
        """Numbers of the servers that have the present weights."""
        # Pauses vary from client to client; nothing that is sampled depends on them.
        self._jitter = random.Random()
        self.model, self.capabilities = self._look()

    @property
    def weight_version(self) -> int:
        """Version of the last update."""
        return self._version

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Send weights to every server; those that did not take them get no requests until they take others.

        With several ranks all of them call this; the first one sends, and all learn how it went.

        Raises:
            ValueError: the servers are of a kind that takes no weights.
            RolloutUnavailable: no server took them; names each with the version and the reason.
        """
        if not self.adapter.takes_weights:
            raise ValueError(
                f"rollout.server.kind={self.config.kind} takes no weights from a trainer: use kind=nemo_mapo to train"
            )
        outcome: tuple[str | None, set[int], str] = (None, set(), "")
        if _is_first_rank():
            try:
                self._wait_for_a_server()
                sent = self.sender.send(version, tensors)
                outcome = (sent.digest, sent.taken_by, sent.explanation)
            except (RolloutUnavailable, Refused) as error:
                outcome = (None, set(), str(error))
        if _several_ranks():
            # Gathering a tensor takes all ranks, also when it is not sent any more.
            for _ in tensors:
                pass
        digest, taken_by, explanation = _from_first_rank(outcome)
        if explanation:
            logger.error(explanation)
        if not taken_by:
            raise RolloutUnavailable(f"no rollout server took version {version} of the weights: {explanation}")
        self._version, self._digest, self._usable = version, digest, taken_by

    def generate(
        self, prompts: PromptBatch, sampling: SamplingConfig, *, group_size: int, seeds: Int[Tensor, " batch"]
    ) -> Rollouts:
        """Sample completions; see `RolloutBackend.generate`. The result lies where the prompts lie.

        With several ranks all of them call this. One rank of each model replica asks, for all of them to have the same
        tokens, and a failure of one is raised on all.

        Raises:
            ValueError: this kind of server cannot serve the request.
            RolloutUnavailable: a prompt has no completions after `max_attempts` requests; names servers and reasons.
        """
        return self.begin(prompts, sampling, group_size=group_size, seeds=seeds).result()

    def release(self) -> None:
        """Nothing: servers have memory of their own."""

    def begin(
        self, prompts: PromptBatch, sampling: SamplingConfig, *, group_size: int, seeds: Int[Tensor, " batch"]
    ) -> PendingRollouts:
        """Send the requests of `generate` from threads of their own and return at once; ValueError as there."""
        self.adapter.refuse(sampling)
        if self.adapter.takes_weights and self._digest is None:
            raise ValueError("the rollout servers have no weights from here yet: call update_weights first")
        if seeds.shape != (len(prompts) * group_size,) or group_size < 1:
            raise ValueError(f"{len(prompts)} prompts x group_size={group_size} need as many seeds, not {len(seeds)}")
        rows = prompt_rows(prompts, self.sample_rate)
        per_request = self.adapter.completions_per_request or group_size
        requests = [
            (
                rows[start // group_size],
                Wanted(
                    sampling=sampling,
                    seeds=tuple(seeds[start : min(start + per_request, end)].tolist()),
                    weight_version=self._version,
                    weight_digest=self._digest,
                ),
            )
            for end in range(group_size, len(seeds) + 1, group_size)
            for start in range(end - group_size, end, per_request)
        ]
        given_up = threading.Event()
        asks = _asks_for_its_replica()
        return _Pending(
            completions=self._asking.submit(self._complete, requests, given_up) if asks else None,
            given_up=given_up,
            rollouts=partial(self._rollouts, prompts, group_size, self._version),
        )

    def _complete(self, requests: Sequence[tuple[PromptRow, Wanted]], given_up: threading.Event) -> list[Completion]:
        """Completions of all requests, in order; the first request that fails for good ends them all."""

        def work(number: int, prompt: PromptRow, wanted: Wanted) -> list[Completion]:
            try:
                return self._with_retries(number, prompt, wanted, given_up)
            except RolloutUnavailable:
                given_up.set()
                raise

        with ThreadPoolExecutor(self.config.max_in_flight, thread_name_prefix="rollout") as pool:
            futures = [pool.submit(work, number, *request) for number, request in enumerate(requests)]
        failures = [failure for future in futures if (failure := future.exception()) is not None]
        if failures:
            raise next((one for one in failures if not isinstance(one, _GivenUp)), failures[0])
        return [completion for future in futures for completion in future.result()]

    def _with_retries(
        self, number: int, prompt: PromptRow, wanted: Wanted, given_up: threading.Event
    ) -> list[Completion]:
        reasons: dict[str, str] = {}
        pause = 0.0
        for attempt in range(self.config.max_attempts):
            if given_up.wait(pause):
                raise _GivenUp("another request failed for good")
            servers = sorted(self._usable)
            if not servers:
                break
            chosen = servers[(number + attempt) % len(servers)]
            server = self.servers[chosen]
            pause = self._pause(attempt)
            try:
                return self._ask(server, prompt, wanted)
            except Unreachable as error:
                reasons[server.url] = str(error)
                pause = max(pause, error.retry_after_seconds)
                if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
                    # It may have been started anew, without weights.
                    self.sender.repeat(chosen, wanted.weight_version, wanted.weight_digest)
            except Refused as error:
                reasons[server.url] = str(error)
                if error.status != HTTPStatus.CONFLICT:
                    break
                # It was started anew, or someone else gave it weights.
                if not self.sender.repeat(chosen, wanted.weight_version, wanted.weight_digest):
                    self._usable = self._usable - {chosen}
            logger.debug(f"attempt {attempt + 1}: {reasons}")
        raise RolloutUnavailable(
            f"no completions of version {wanted.weight_version} within {self.config.max_attempts} attempts: "
            + "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
        )

    def _ask(self, server: ServerConnection, prompt: PromptRow, wanted: Wanted) -> list[Completion]:
        answer = server.post(self.adapter.path, self.adapter.request(self.model, prompt, wanted))
        try:
            completions = self.adapter.completions(answer, prompt, wanted)
            check_completions(completions, wanted, len(self.tokenizer))
        except (BadAnswer, KeyError, IndexError, TypeError, ValueError) as error:
            raise RolloutUnavailable(f"{server.url} answered with something else than asked: {error!r}") from error
        return completions

    def _pause(self, attempt: int) -> float:
        """Seconds before the attempt after this one."""
        longest = min(self.config.pause_seconds * 2.0**attempt, LONGEST_PAUSE_SECONDS)
        return longest * self._jitter.uniform(0.5, 1.0)

    def _wait_for_a_server(self) -> None:
        """Return when a server answers; RolloutUnavailable after `max_attempts` rounds."""
        self._first_answer(lambda server: server.get("/v1/models"))

    def _first_answer(self, ask: Callable[[ServerConnection], Body]) -> Body:
        reasons: dict[str, str] = {}
        for attempt in range(self.config.max_attempts):
            if attempt:
                time.sleep(self._pause(attempt - 1))
            for server in self.servers:
                try:
                    return ask(server)
                except Unreachable as error:
                    reasons[server.url] = str(error)
        raise RolloutUnavailable("; ".join(f"{url}: {reason}" for url, reason in reasons.items()))

    def _look(self) -> tuple[str, Capabilities]:
        """Name and capabilities of the served model; ValueError where the server has not the one configured."""
        try:
            listed = self._first_answer(lambda server: server.get("/v1/models"))
        except Refused as error:
            raise ValueError(
                f"rollout.server.urls: {error}; is the token in the environment variable "
                f"{self.config.token_variable} (rollout.server.token_variable) that of the server?"
            ) from error
        models = {model["id"]: model for model in listed["data"]}
        name = self.config.model or next(iter(models))
        if name not in models or (self.config.model is None and len(models) > 1):
            raise ValueError(
                f"rollout.server.model={self.config.model}: the server lists {', '.join(models)}; name one"
            )
        try:
            return name, self.adapter.capabilities(models[name])
        except BadAnswer as error:
            raise ValueError(f"rollout.server.kind={self.config.kind}: {error}") from error

    def _rollouts(
        self, prompts: PromptBatch, group_size: int, version: int, completions: Sequence[Completion]
    ) -> Rollouts:
        device = prompts.tokens.device

        def padded(rows: Iterable[Sequence[int | float]], fill: int | float, dtype: torch.dtype) -> Tensor:
            tensors = [torch.tensor(row, dtype=dtype) for row in rows]
            return pad_sequence(tensors, batch_first=True, padding_value=fill).to(device)

        return Rollouts(
            prompts=prompts,
            group_size=group_size,
            completions=padded((one.token_ids for one in completions), self._special.pad_id, torch.int64),
            completion_lengths=torch.tensor([len(one.token_ids) for one in completions], device=device),
            finish_reasons=tuple("stop" if one.stopped else "length" for one in completions),
            texts=tuple(
                completion_text(self.tokenizer, one.token_ids[: len(one.token_ids) - one.stopped])
                for one in completions
            ),
            log_probs=padded((one.log_probs for one in completions), 0.0, torch.float32),
            sampling_log_probs=padded((one.sampling_log_probs for one in completions), 0.0, torch.float32),
            weight_version=version,
        )


class _GivenUp(RolloutUnavailable):
    """Not tried further, because another request of the call had failed or the call was abandoned."""


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A `PendingRollouts` of servers."""

    completions: "Future[list[Completion]] | None"
    """None on a rank that has another one ask for it."""
    given_up: threading.Event
    rollouts: Callable[[Sequence[Completion]], Rollouts]

    def result(self) -> Rollouts:
        """Wait; a failure of one rank is raised on all."""
        outcome: list[Completion] | RolloutUnavailable = []
        if self.completions is not None:
            try:
                outcome = self.completions.result()
            except RolloutUnavailable as error:
                outcome = error
        outcome = _from_asking_rank(outcome)
        somewhere = _any_rank(isinstance(outcome, RolloutUnavailable))
        if isinstance(outcome, RolloutUnavailable):
            raise outcome
        if somewhere:
            raise RolloutUnavailable("another rank has no completions; its message says why")
        return self.rollouts(outcome)

    def abandon(self) -> None:
        """Send no further request."""
        self.given_up.set()


def prompt_rows(prompts: PromptBatch, sample_rate: int) -> list[PromptRow]:
    """The prompts one by one, without padding."""
    rows = []
    for row in range(len(prompts)):
        clips = prompts.clips(row)
        if len(clips) > 1:
            raise ValueError(
                f"prompt {prompts.examples[row].id!r} has {len(clips)} clips, and a rollout server takes one; generate "
                "in this process (rollout.backend=megatron), or join them in an evaluation (data.clip_gap_seconds=0.5)"
            )
        waveform: Float[Tensor, " samples"] | None = None
        if clips:
            waveform = prompts.audio.waveforms[clips[0], : int(prompts.audio.lengths[clips[0]])].cpu()
        ids = tuple(prompts.tokens[row, : int(prompts.lengths[row])].tolist())
        rows.append(PromptRow(token_ids=ids, waveform=waveform, sample_rate=sample_rate))
    return rows


def _is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _several_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _any_rank(flag: bool) -> bool:
    return any_rank(flag) if _several_ranks() else flag


def _from_first_rank(value: Any) -> Any:
    """What the first rank has, on all of them."""
    if not _several_ranks():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _asks_for_its_replica() -> bool:
    """Whether this rank is the one of its model replica that sends requests."""
    return not _several_ranks() or dist.get_rank() == parallel_state.get_model_parallel_src_rank()


def _from_asking_rank(value: Any) -> Any:
    """What the asking rank of this model replica has, on all ranks of the replica."""
    if not _several_ranks():
        return value
    box = [value]
    source = parallel_state.get_model_parallel_src_rank()
    dist.broadcast_object_list(box, src=source, group=parallel_state.get_model_parallel_group())
    return box[0]
