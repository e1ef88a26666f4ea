"""Weight updates of vLLM without files: its weight transfer API, from the trainer's first rank to each server."""

import base64
import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Final, Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor

from nemo_mapo.http_client import Refused, Unreachable
from nemo_mapo.rollout.vllm.server import NO_WEIGHTS, VllmServer, unfinished
from nemo_mapo.rollout.vllm.weights import NamedTensors, WeightsError, buckets

MOST_BYTES: Final = 2**31 - 1
"""Of one broadcast: torch counts its elements, which are bytes here, with 32 bits."""
_POLL_SECONDS: Final = 0.002
_FAILURES: Final = (Unreachable, Refused, WeightsError, RuntimeError)
"""RuntimeError is what torch raises for an error of NCCL."""


@runtime_checkable
class Group(Protocol):
    """A communicator of the trainer (rank 0) and the workers of one server (the ranks after it)."""

    def send(self, data: UInt8[Tensor, " bytes"]) -> Callable[[], bool]:
        """Begin to broadcast; the returned function tells whether everything has been sent."""
        ...


@runtime_checkable
class Transport(Protocol):
    """Creates communicators."""

    def unique_id(self) -> bytes:
        """Id of a new communicator, the same for all ranks that join."""
        ...

    def join(self, unique_id: bytes, ranks: int) -> Group:
        """Join as rank 0; returns when all others have joined."""
        ...


class WeightTransfer:
    """Sends weights to servers bucket by bucket, each bucket to one server after the other.

    >>> transfer = WeightTransfer(Nccl(policy.device), bucket_bytes=2**29, timeout_seconds=600)
    >>> transfer.send(servers, "run-7", served_weights(tensors, config, prefix=""))
    {}
    """

    def __init__(self, transport: Transport, *, bucket_bytes: int, timeout_seconds: float) -> None:
        """A server may take at most `timeout_seconds` per bucket."""
        self._transport = transport
        self._bucket_bytes = bucket_bytes
        self._timeout_seconds = timeout_seconds
        self._groups: dict[str, tuple[Group, str]] = {}
        """Of each server by its address, with the version of the last weights that it took."""

    def send(self, servers: Sequence[VllmServer], version: str, tensors: NamedTensors) -> dict[int, str]:
        """Send the weights to all servers, which then report them as `version` unfinished.

        Returns:
            For each server that did not accept all of them, by number, the reason.

        Raises:
            WeightsError: a tensor is too large.
        """
        failed: dict[int, str] = {}

        def each(step: Callable[[VllmServer], None]) -> bool:
            for number, server in enumerate(servers):
                if number not in failed:
                    try:
                        step(server)
                    except _FAILURES as error:
                        failed[number] = str(error)
                        self._groups.pop(server.url, None)
            return len(failed) < len(servers)

        with contextlib.ExitStack() as locks:
            for server in servers:
                locks.enter_context(server.updating)
            if not each(partial(self._start, version=version)):
                return failed
            for bucket in buckets(tensors, max_bytes=self._bucket_bytes, keep=Tensor.detach):
                fields, packed = _described(bucket), _packed(bucket)
                del bucket
                if not each(partial(self._put, fields=fields, packed=packed)):
                    return failed
            each(partial(self._finish, version=version))
        return failed

    def _start(self, server: VllmServer, version: str) -> None:
        _, last = self._groups.get(server.url, (None, None))
        told = server.weight_version()
        if last is None or told not in (last, unfinished(last)):
            self._connect(server, anew=told != NO_WEIGHTS)
        server.begin_update(version)
        server.http.post("/start_weight_update")

    def _connect(self, server: VllmServer, *, anew: bool) -> None:
        """A communicator with a server's workers; `anew` first ends an existing one."""
        if anew:
            for route in ("/finish_weight_update", "/shutdown_weight_transfer_engine"):
                # There may be none, or no update that was broken off.
                with contextlib.suppress(Unreachable):
                    server.http.post(route)
        ranks = 1 + int(server.http.get("/get_world_size")["world_size"])
        unique_id = self._transport.unique_id()
        fields = {
            "nccl_unique_id_b64": base64.b64encode(unique_id).decode(),
            "rank_offset": 1,
            "world_size": ranks,
            "packed": True,
            # A bucket is one broadcast: vLLM begins another one where a bucket is larger than this.
            "packed_buffer_size_bytes": self._bucket_bytes,
        }
        joined = _begun(self._transport.join, unique_id, ranks)
        self._together(server, "/init_weight_transfer_engine", {"init_info": fields}, joined.done)
        self._groups[server.url] = joined.result(), ""

    def _put(self, server: VllmServer, fields: Mapping[str, Any], packed: UInt8[Tensor, " bytes"]) -> None:
        group, _ = self._groups[server.url]
        self._together(server, "/update_weights", {"update_info": dict(fields)}, group.send(packed))

    def _finish(self, server: VllmServer, version: str) -> None:
        group, _ = self._groups[server.url]
        server.http.post("/finish_weight_update", {"weight_version": unfinished(version)})
        server.end_update()
        self._groups[server.url] = group, version

    def _together(self, server: VllmServer, route: str, body: dict[str, Any], done: Callable[[], bool]) -> None:
        """Ask a server to do its part of the current transfer; returns when both sides are done.

        Raises:
            Unreachable, Refused: the server failed, or one of them is not done in time.
        """
        asked = _begun(server.http.post, route, body)
        until = time.monotonic() + self._timeout_seconds
        while not (asked.done() and done()):
            if asked.done():
                asked.result()
            if time.monotonic() > until:
                raise Unreachable(f"{server.url}{route}: not done within {self._timeout_seconds:g} s")
            time.sleep(_POLL_SECONDS)
        asked.result()


class Nccl:
    """Communicators of NCCL, with the trainer's GPU in each; both sides need the same release of NCCL."""

    def __init__(self, device: torch.device) -> None:
        """`device` is the first rank's, on which whole tensors are put together."""
        self._device = device

    def unique_id(self) -> bytes:
        """See `Transport`."""
        return bytes(torch.cuda.nccl.unique_id())  # type: ignore[no-untyped-call]

    def join(self, unique_id: bytes, ranks: int) -> Group:
        """See `Transport`."""
        with torch.cuda.device(self._device):
            communicator = torch.cuda.nccl.init_rank(ranks, unique_id, 0)  # type: ignore[no-untyped-call]
            return _NcclGroup(communicator, self._device)


class _NcclGroup:
    def __init__(self, communicator: object, device: torch.device) -> None:
        self._communicator = communicator
        self._device = device
        # A separate stream: a broadcast that a server does not join must not block the trainer's stream.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            # Every rank of a communicator that vLLM makes from an id begins with this.
            one = torch.zeros(1, device=device)
            torch.cuda.nccl.all_reduce([one], streams=[self._stream], comms=[communicator])  # type: ignore[no-untyped-call]
        self._stream.synchronize()

    def send(self, data: UInt8[Tensor, " bytes"]) -> Callable[[], bool]:
        """See `Group`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        torch.cuda.nccl.broadcast([data], root=0, streams=[self._stream], comms=[self._communicator])
        data.record_stream(self._stream)
        sent: Callable[[], bool] = self._stream.record_event().query
        return sent


def _described(bucket: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a server needs to know to unpack a bucket."""
    return {
        "names": list(bucket),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in bucket.values()],
        "shapes": [list(tensor.shape) for tensor in bucket.values()],
    }


def _packed(bucket: Mapping[str, Tensor]) -> UInt8[Tensor, " bytes"]:
    """The bytes of a bucket, one tensor after the other.

    Raises:
        WeightsError: they are too many for a broadcast.
    """
    if (size := sum(tensor.nbytes for tensor in bucket.values())) > MOST_BYTES:
        raise WeightsError(
            f"{', '.join(bucket)} has {size} bytes, more than the {MOST_BYTES} of one broadcast; set "
            "rollout.vllm.weight_sync=directory"
        )
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in bucket.values()])


def _begun(work: Callable[..., Any], *arguments: Any) -> "Future[Any]":
    """Work in a daemon thread."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="weights").start()
    return future
