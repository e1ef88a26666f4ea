"""The trainer's side of a weight update: announce it to every server, send, and collect what each says."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from nemo_mapo.config.rollout import RolloutServerConfig
from nemo_mapo.rollout.client_http import Refused, RolloutUnavailable, ServerConnection, Unreachable
from nemo_mapo.rollout.weight_sync import (
    Channel,
    NamedTensors,
    SendingEnd,
    abort_message,
    bucket_message,
    buckets,
    digest_of,
    end_message,
    write_update,
)

_POLL_SECONDS: Final = 0.01


@dataclass(frozen=True, kw_only=True)
class Sent:
    """How an update went."""

    digest: str
    taken_by: set[int]
    """Numbers of the servers that acknowledged it."""
    explanation: str
    """Server, version and reason for each that did not; empty when all did."""


class WeightSender:
    """Sends updates to servers, one after the other."""

    def __init__(self, config: RolloutServerConfig, servers: list[ServerConnection]) -> None:
        self._config = config
        self._servers = servers
        self._repeatable: dict[str, Any] | None = None
        self._repeating = threading.Lock()

    def send(self, version: int, tensors: NamedTensors) -> Sent:
        """Send one update to all servers; a server that fails does not keep the others from it."""
        self._repeatable = None
        with ThreadPoolExecutor(len(self._servers), thread_name_prefix="weights") as pool:
            if self._config.weight_sync == "directory":
                return self._through_directory(version, tensors, pool)
            return self._through_process_groups(version, tensors, pool)

    def repeat(self, server: int, version: int, digest: str | None) -> bool:
        """Whether a server has the last update, which it is sent again where it lies in a directory."""
        connection = self._servers[server]
        with self._repeating:
            try:
                told = connection.get("/v1/weights")
                if self._repeatable is not None and (told["version"], told["digest"]) != (version, digest):
                    told = connection.post("/v1/weights", self._repeatable)
            except (Unreachable, Refused):
                return False
            return (told["version"], told["digest"]) == (version, digest)

    def _through_directory(self, version: int, tensors: NamedTensors, pool: ThreadPoolExecutor) -> Sent:
        assert self._config.sync_dir is not None, "the config demands it"
        try:
            name, digest = write_update(Path(self._config.sync_dir), version, tensors, bucket_bytes=self._bucket_bytes)
        except OSError as error:
            raise RolloutUnavailable(f"version {version} cannot be written: {error}") from error
        self._repeatable = {"version": version, "directory": name}
        answers = [pool.submit(server.post, "/v1/weights", self._repeatable) for server in self._servers]
        return self._collect(version, digest, answers)

    def _through_process_groups(self, version: int, tensors: NamedTensors, pool: ThreadPoolExecutor) -> Sent:
        end = SendingEnd(
            self._config.sync_host, backend=self._config.sync_backend, timeout_seconds=self._config.timeout_seconds
        )
        answers = [
            pool.submit(server.post, "/v1/weights", {"version": version, "process_group": asdict(end.address(number))})
            for number, server in enumerate(self._servers)
        ]
        channels = list(self._open(end, answers))
        checksums = []
        try:
            for bucket in buckets(tensors, max_bytes=self._bucket_bytes):
                checksum, parts = bucket_message(bucket)
                checksums.append(checksum)
                for part in parts:
                    channels = [channel for channel in channels if _sent(channel, part)]
        # Else the servers would wait for the rest until their time is up, and the pool for them.
        except BaseException as error:
            _send_to_all(channels, abort_message(repr(error)))
            raise
        digest = digest_of(checksums)
        _send_to_all(channels, end_message(digest))
        return self._collect(version, digest, answers)

    def _open(self, end: SendingEnd, answers: "list[Future[dict[str, Any]]]") -> Iterator[Channel]:
        """Channels to the servers that join; one that has answered already refused."""
        waiting = set(range(len(answers)))
        until = time.monotonic() + self._config.timeout_seconds
        while waiting and time.monotonic() < until:
            for number in sorted(waiting):
                if end.has_joined(number):
                    waiting.remove(number)
                    channel = _opened(end, number)
                    if channel is not None:
                        yield channel
                elif answers[number].done():
                    waiting.remove(number)
            time.sleep(_POLL_SECONDS)

    def _collect(self, version: int, digest: str, answers: "list[Future[dict[str, Any]]]") -> Sent:
        taken_by: set[int] = set()
        reasons = []
        for number, answer in enumerate(answers):
            try:
                told = answer.result()
                if (told["version"], told["digest"]) == (version, digest):
                    taken_by.add(number)
                    continue
                reason = f"it acknowledged {told}"
            except (Unreachable, Refused, KeyError) as error:
                reason = str(error)
            reasons.append(f"{self._servers[number].url} did not take version {version}: {reason}")
        return Sent(digest=digest, taken_by=taken_by, explanation="; ".join(reasons))

    @property
    def _bucket_bytes(self) -> int:
        return round(self._config.bucket_megabytes * 2**20)


def _opened(end: SendingEnd, server: int) -> Channel | None:
    """The channel to a server that has joined; None where it has gone again."""
    try:
        return end.channel(server)
    except RuntimeError:
        return None


def _send_to_all(channels: list[Channel], part: Tensor) -> None:
    for channel in channels:
        _sent(channel, part)


def _sent(channel: Channel, part: Tensor) -> bool:
    """Whether the part went out; a server that is gone tells why over HTTP, or no more."""
    try:
        channel.send(part)
    except RuntimeError:
        return False
    return True
