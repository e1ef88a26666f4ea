"""Rollouts from vLLM, with retries, failover and checks of the weight version."""

import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.config.run import RolloutConfig, SamplingConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.processes import is_main_rank
from nemo_mapo.ranks import any_rank, asks_for_its_replica, from_asking_rank, from_main_rank, world_size
from nemo_mapo.rollout.completions import Drawn, completed
from nemo_mapo.rollout.protocol import PendingCompletions, RolloutUnavailable
from nemo_mapo.rollout.scoring import Drawing
from nemo_mapo.rollout.vllm.fleet import Fleet, Update
from nemo_mapo.rollout.vllm.probe import Probe, difference
from nemo_mapo.rollout.vllm.requests import RequestPrompt, Wanted, WayIn
from nemo_mapo.rollout.vllm.weights import WeightsError, served_weights, write_update
from nemo_mapo.rows import Completion, Prompt

logger = logging.getLogger(__name__)


class VllmRollout:
    """A `RolloutBackend` on vLLM servers.

    Each prompt is made and sent once for all of its completions. A request that fails is sent again, to the next
    server, after a growing pause; when it has failed `max_attempts` times, RolloutUnavailable ends the call, and
    nothing of it is returned.
    """

    def __init__(
        self,
        fleet: Fleet,
        way_in: WayIn,
        policy: AudioLLM,
        tokenizer: PreTrainedTokenizerBase,
        config: RolloutConfig,
        model_config: ModelConfig,
        *,
        prefix: str,
        sample_rate: int,
        directory: Path,
    ) -> None:
        """Connect servers and policy.

        Args:
            fleet: the servers.
            way_in: how prompts get into them.
            policy: whose weights are sent; its perception makes prompts that are embeddings.
            tokenizer: the policy's.
            config: sampling, limits, alarm.
            model_config: the policy's.
            prefix: before the thinker's names in vLLM's model.
            sample_rate: of clips, Hz.
            directory: for updates, which all servers can read.
        """
        assert config.vllm is not None
        self.fleet = fleet
        self.way_in = way_in
        self.policy = policy
        self.tokenizer = tokenizer
        self.config = config
        self.drawing = Drawing.of(config.sampling, tokenizer, policy.vocab_size)
        self._model_config = model_config
        self._prefix = prefix
        self._directory = directory
        special = SpecialTokens.from_tokenizer(tokenizer)
        self._probe = Probe.of(policy, self.drawing, special, sample_rate=sample_rate)
        self._run = secrets.token_hex(6)
        self._version: int | None = None
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="rollouts")

    @property
    def weight_version(self) -> int:
        """Version of the last update; 0 before the first."""
        return self._version or 0

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load weights into every server; a server that fails gets no requests until a later update succeeds.

        An update has succeeded when the server's log-probs of a fixed prompt's completion equal the policy's within
        `rollout.log_prob_alarm`. With several ranks all of them call this; the first one sends.

        Raises:
            RolloutUnavailable: no server took them; names each with the reason.
        """
        self._version = None
        prompts = self.way_in.prompts([self._probe.prompt]) if self.policy.pre_process else []
        sent = self._send(version, tensors, prompts) if is_main_rank() else None
        if world_size() > 1:
            # Gathering a tensor needs all ranks, even if it is no longer sent.
            for _ in tensors:
                pass
        update, taken, reasons = from_main_rank(sent)
        scored = self._probe.scored(self.policy, list(taken.values())) if taken else []
        mismatches = {
            number: difference(torch.tensor(one.sampling_log_probs), taken[number])
            for number, one in zip(taken, scored, strict=True)
        }
        accepted = self.fleet.accept(update.version, mismatches) if is_main_rank() else None
        usable, refusals = from_main_rank(accepted)
        failures = "; ".join([*reasons, *refusals])
        if not usable:
            raise RolloutUnavailable(f"no vLLM server took version {version} of the weights: {failures}")
        if failures:
            logger.error(failures)
        self.fleet.usable = usable
        self.fleet.update = replace(update, expected=scored[list(taken).index(min(usable))])
        self._version = version

    def _send(
        self, version: int, tensors: Iterable[tuple[str, Tensor]], prompts: Sequence[RequestPrompt]
    ) -> tuple[Update, dict[int, Drawn], list[str]]:
        """On the first rank: write the weights and load them into the servers; see `Fleet.load`."""
        settings = self.config.vllm
        assert settings is not None
        # Two runs may both have a version 7.
        update = Update(directory=None, version=f"{self._run}-{version}", prompt=prompts[0], wanted=self._probe.wanted)
        try:
            self.fleet.wait_for_a_server()
            weights = served_weights(tensors, self._model_config, prefix=self._prefix)
            if settings.weight_sync == "directory":
                written = write_update(self._directory, version, weights, bucket_bytes=settings.bucket_bytes)
                update = replace(update, directory=written)
            return update, *self.fleet.load(update, weights)
        except (RolloutUnavailable, WeightsError) as error:
            return update, {}, [str(error)]

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, group_size: int, seeds: Int[Tensor, " batch"]
    ) -> list[list[Completion]]:
        """Sample completions; see `RolloutBackend.generate`.

        With several ranks all of them call this. One rank per model replica sends the requests, so that all its ranks
        get the same tokens, and a failure on one rank is raised on all.

        Raises:
            ValueError: vLLM cannot serve the request.
            RolloutUnavailable: a prompt has no completions after `max_attempts` requests; names servers and reasons.
        """
        return self.begin(prompts, sampling, group_size=group_size, seeds=seeds).result()

    def release(self) -> None:
        """Nothing: servers have memory of their own."""

    def begin(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, group_size: int, seeds: Int[Tensor, " batch"]
    ) -> PendingCompletions:
        """Send the requests of `generate` from separate threads and return at once; ValueError as there."""
        if self._version is None:
            raise ValueError("the vLLM servers have no weights from here yet: call update_weights first")
        if seeds.shape != (len(prompts) * group_size,) or group_size < 1:
            raise ValueError(f"{len(prompts)} prompts x group_size={group_size} need as many seeds, not {len(seeds)}")
        made = self.way_in.prompts(prompts) if self.policy.pre_process else []
        given_up = threading.Event()
        asked = None
        if asks_for_its_replica():
            drawing = replace(self.drawing, sampling=sampling)
            groups = seeds.view(len(prompts), group_size).tolist()
            requests = [
                (prompt, wanted)
                for prompt, group in zip(made, groups, strict=True)
                for wanted in _requests(group, drawing)
            ]
            asked = self._asking.submit(self.fleet.complete, requests, given_up)
        return _Pending(
            drawn=asked,
            given_up=given_up,
            prompts=prompts,
            group_size=group_size,
            completed=partial(completed, tokenizer=self.tokenizer, weight_version=self._version),
        )

    def close(self) -> None:
        """Stop the server that was started for this backend, if there is one."""
        self.fleet.close()


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A `PendingCompletions` of servers."""

    drawn: "Future[list[Drawn]] | None"
    """None on a rank that has another one ask for it."""
    given_up: threading.Event
    prompts: Sequence[Prompt]
    group_size: int
    completed: Callable[[Drawn, Prompt], Completion]

    def result(self) -> list[list[Completion]]:
        """Wait; a failure of one rank is raised on all."""
        outcome: list[Drawn] | RolloutUnavailable = []
        if self.drawn is not None:
            try:
                outcome = self.drawn.result()
            except RolloutUnavailable as error:
                outcome = error
        outcome = from_asking_rank(outcome)
        somewhere = any_rank(isinstance(outcome, RolloutUnavailable))
        if isinstance(outcome, RolloutUnavailable):
            raise outcome
        if somewhere:
            raise RolloutUnavailable("another rank has no completions; its message says why")
        drawn = iter(outcome)
        return [[self.completed(next(drawn), prompt) for _ in range(self.group_size)] for prompt in self.prompts]

    def abandon(self) -> None:
        """Send no further request."""
        self.given_up.set()


def _requests(seeds: Sequence[int], drawing: Drawing) -> Iterator[Wanted]:
    """Seeds of one prompt as runs of consecutive seeds, one request each."""
    start = 0
    for end in range(1, len(seeds) + 1):
        if end == len(seeds) or seeds[end] != seeds[end - 1] + 1:
            yield Wanted(drawing=drawing, first_seed=seeds[start], count=end - start)
            start = end
