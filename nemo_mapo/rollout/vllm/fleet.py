"""The servers of a run: tracks which have the present weights, and gets completions from these."""

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from nemo_mapo.config.rollout import VllmConfig
from nemo_mapo.http_client import Pauses, Refused, Unreachable
from nemo_mapo.rollout.completions import BadAnswer, Drawn, check_completions
from nemo_mapo.rollout.protocol import RolloutUnavailable
from nemo_mapo.rollout.vllm.probe import difference
from nemo_mapo.rollout.vllm.process import VllmProcess
from nemo_mapo.rollout.vllm.requests import RequestPrompt, Wanted, WayIn, WrongWeights
from nemo_mapo.rollout.vllm.server import VllmServer, unfinished
from nemo_mapo.rollout.vllm.transfer import WeightTransfer
from nemo_mapo.rollout.vllm.weights import NamedTensors, WeightsError

_FAILURES: Final = (Unreachable, Refused, WrongWeights, RolloutUnavailable, WeightsError)


class GivenUp(RolloutUnavailable):
    """Not retried, because another request of the call failed or the call was abandoned."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Update:
    """Weights for the servers, and the probe by which a server proves that it has them."""

    directory: Path | None
    """Where they lie; None for weights that were sent without files, which are not there a second time."""
    version: str
    """What a server calls them; no other update, of any run, has the same."""
    prompt: RequestPrompt
    """The probe's."""
    wanted: Wanted
    expected: Drawn | None = None
    """The probe's completion, with the log-probs that the policy gives it; None before it is known."""


class Fleet:
    """Servers that share the prompts of a batch."""

    def __init__(
        self,
        servers: Sequence[VllmServer],
        way_in: WayIn,
        config: VllmConfig,
        *,
        vocab_size: int,
        alarm: float,
        process: VllmProcess | None = None,
        transfer: WeightTransfer | None = None,
    ) -> None:
        """Group the servers.

        Args:
            servers: one at least.
            way_in: how prompts get into them.
            config: attempts, pauses, requests at a time.
            vocab_size: of the tokenizer; a completion has no other tokens.
            alarm: largest mean difference of the probe's log-probs from the policy's, nats.
            process: the server that was started for this run, if one was; it may still be starting.
            transfer: puts weights in without files; None for weights from directories.
        """
        self.servers = servers
        self.usable: frozenset[int] = frozenset()
        """Numbers of the servers that have the weights of `update`."""
        self.update: Update | None = None
        self._way_in = way_in
        self._config = config
        self._vocab_size = vocab_size
        self._alarm = alarm
        self._process = process
        self._transfer = transfer

    def wait_for_a_server(self) -> None:
        """Return when one answers.

        Raises:
            RolloutUnavailable: none answers within `max_attempts` rounds.
            ValueError: one is unsuitable, or requires a different key.
        """
        if self._process is not None:
            self._process.wait_until_it_serves(self._config.start_seconds)
        pauses, reasons = Pauses(self._config.pause_seconds), dict[str, str]()
        for attempt in range(self._config.max_attempts):
            if attempt:
                time.sleep(pauses.next())
            for server in self.servers:
                try:
                    server.look()
                except Unreachable as error:
                    reasons[server.url] = str(error)
                except Refused as error:
                    raise ValueError(
                        f"{error}; is the key in the environment variable {self._config.api_key_variable} "
                        "(rollout.vllm.api_key_variable) that of the server?"
                    ) from error
                else:
                    return
        raise RolloutUnavailable("no vLLM server answers: " + _listed(reasons))

    def load(self, update: Update, tensors: NamedTensors) -> tuple[dict[int, Drawn], list[str]]:
        """Load an update into every server and have each complete the probe.

        Args:
            update: what they are to have.
            tensors: the weights, of an update without a directory.

        Returns:
            Completions by number of the server, and for each other server the reason why there is none.
        """
        failed: dict[int, str] = {}
        if update.directory is None:
            assert self._transfer is not None
            failed = self._transfer.send(self.servers, update.version, tensors)
        with ThreadPoolExecutor(len(self.servers), thread_name_prefix="weights") as pool:
            futures = {
                number: pool.submit(self._load_one, server, update)
                for number, server in enumerate(self.servers)
                if number not in failed
            }
        taken: dict[int, Drawn] = {}
        for number, future in futures.items():
            try:
                taken[number] = future.result()
            except _FAILURES as error:
                failed[number] = str(error)
        ended = "" if self._process is None else self._process.ended()
        return taken, [f"{self.servers[one].url} did not take them: {ended or failed[one]}" for one in sorted(failed)]

    def accept(self, version: str, mismatches: Mapping[int, float]) -> tuple[frozenset[int], list[str]]:
        """Set the version of servers whose probe agrees with the policy; returns these, and reasons for the others."""
        accepted, reasons = set(), []
        for number, nats in mismatches.items():
            server = self.servers[number]
            try:
                self._refuse_mismatch(server, nats)
                server.name(version)
                accepted.add(number)
            except _FAILURES as error:
                reasons.append(str(error))
        return frozenset(accepted), reasons

    def complete(self, requests: Sequence[tuple[RequestPrompt, Wanted]], given_up: threading.Event) -> list[Drawn]:
        """Completions of all requests, in order; the first request that fails for good ends them all."""

        def work(number: int, prompt: RequestPrompt, wanted: Wanted) -> list[Drawn]:
            try:
                return self._with_retries(number, prompt, wanted, given_up)
            except RolloutUnavailable:
                given_up.set()
                raise

        with ThreadPoolExecutor(self._config.max_in_flight, thread_name_prefix="rollout") as pool:
            futures = [pool.submit(work, number, *request) for number, request in enumerate(requests)]
        failures = [failure for future in futures if (failure := future.exception()) is not None]
        if failures:
            raise next((one for one in failures if not isinstance(one, GivenUp)), failures[0])
        return [completion for future in futures for completion in future.result()]

    def close(self) -> None:
        """Stop the server that was started for this run."""
        if self._process is not None:
            self._process.stop()

    def _with_retries(
        self, number: int, prompt: RequestPrompt, wanted: Wanted, given_up: threading.Event
    ) -> list[Drawn]:
        assert self.update is not None
        reasons: dict[str, str] = {}
        pauses, pause = Pauses(self._config.pause_seconds), 0.0
        for attempt in range(self._config.max_attempts):
            if given_up.wait(pause):
                raise GivenUp("another request failed for good")
            usable = sorted(self.usable)
            if not usable:
                break
            chosen = usable[(number + attempt) % len(usable)]
            server, pause = self.servers[chosen], 0.0
            try:
                return self._ask(server, prompt, wanted, self.update.version)
            except Unreachable as error:
                reasons[server.url] = str(error)
                pause = pauses.next(error)
                if self._process is not None and (ended := self._process.ended()):
                    reasons[server.url] = ended
                    break
            except WrongWeights as error:
                # It was restarted, or someone else gave it weights.
                reasons[server.url] = str(error)
                self._bring_up_to_date(chosen, reasons)
            except Refused as error:
                reasons[server.url] = str(error)
                break
        raise RolloutUnavailable(
            f"no completions of weights {self.update.version} within {self._config.max_attempts} attempts: "
            + _listed(reasons)
        )

    def _ask(self, server: VllmServer, prompt: RequestPrompt, wanted: Wanted, version: str) -> list[Drawn]:
        """Completions of these weights; the version is checked before and after, to detect an update in between.

        Raises:
            WrongWeights: the server has others, or got these in between.
        """
        updates = server.updates
        self._check_version(server, version)
        answer = server.http.post(self._way_in.path, self._way_in.body(prompt, wanted))
        sampling = wanted.drawing.sampling
        try:
            completions = self._way_in.completions(answer, prompt, version)
            if sampling.temperature == 0:
                completions = [_certain(completions[0])] * wanted.count
            check_completions(
                completions, count=wanted.count, max_tokens=sampling.max_new_tokens, vocab_size=self._vocab_size
            )
        except (BadAnswer, KeyError, IndexError, TypeError, ValueError) as error:
            raise RolloutUnavailable(
                f"{server.url} answered with something other than what was asked: {error!r}"
            ) from error
        self._check_version(server, version)
        if server.updates != updates:
            raise WrongWeights("the weights were replaced while it generated")
        return completions

    def _check_version(self, server: VllmServer, version: str) -> None:
        if (told := server.weight_version()) != version:
            raise WrongWeights(f"it has weights {told!r}, asked for were {version!r}")

    def _load_one(self, server: VllmServer, update: Update) -> Drawn:
        with server.updating:
            if update.directory is not None:
                server.load(update.directory, update.version)
            return self._probed(server, update)

    def _probed(self, server: VllmServer, update: Update) -> Drawn:
        (completion,) = self._ask(server, update.prompt, update.wanted, unfinished(update.version))
        return completion

    def _bring_up_to_date(self, number: int, reasons: dict[str, str]) -> None:
        """Load the present weights into a server that lost them, or stop using it."""
        server, update = self.servers[number], self.update
        assert update is not None and update.expected is not None
        with server.updating:
            try:
                # Another thread may have done it.
                if server.weight_version() == update.version:
                    return
                if update.directory is None:
                    raise WeightsError("it has lost the weights and gets others with the next update only")
                server.load(update.directory, update.version)
                completion = self._probed(server, update)
                expected = torch.tensor(update.expected.sampling_log_probs)
                same = completion.token_ids == update.expected.token_ids
                self._refuse_mismatch(server, difference(expected, completion) if same else float("inf"))
                server.name(update.version)
            except Unreachable as error:
                reasons[server.url] = str(error)
            except _FAILURES as error:
                reasons[server.url] = str(error)
                self.usable = self.usable - {number}

    def _refuse_mismatch(self, server: VllmServer, nats: float) -> None:
        """RolloutUnavailable if a server does not serve what it was sent."""
        if not nats <= self._alarm:
            raise RolloutUnavailable(
                f"{server.url}: log-probs of the probe differ from the policy's by {nats:.3g} nats per token, more "
                f"than rollout.log_prob_alarm={self._alarm:g}: it does not serve the weights that it was sent"
            )


def _certain(completion: Drawn) -> Drawn:
    """A greedy completion, whose tokens have probability 1."""
    return replace(completion, sampling_log_probs=(0.0,) * len(completion.token_ids))


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
