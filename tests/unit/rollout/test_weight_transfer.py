"""vLLM's weight transfer API, spoken to servers that answer as vLLM 0.32 does; bytes go through queues, not NCCL."""

import base64
import json
import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from typing import Any
from urllib.parse import urlparse

import pytest
import torch
from torch import Tensor

from nemo_mapo.rollout.vllm import transfer as transfer_module
from nemo_mapo.rollout.vllm.server import VllmServer
from nemo_mapo.rollout.vllm.transfer import WeightTransfer
from nemo_mapo.rollout.vllm.weights import WeightsError

BUCKET_BYTES = 400
TENSORS = [
    ("embed", torch.randn(7, 11)),
    ("layer.0", torch.randn(3, 5).bfloat16()),
    ("layer.1", torch.randn(8).bfloat16()),
    ("norm", torch.randn(5)),
    ("head", torch.randn(11, 7).t()),
]
"""Of two types, one odd and one not contiguous."""


@dataclass
class Lines:
    """A transport: a queue per communicator, whose data counts as sent when a worker has taken it."""

    made: dict[bytes, queue.Queue[tuple[Tensor, threading.Event]]] = field(default_factory=dict)
    joined: dict[bytes, threading.Event] = field(default_factory=dict)

    def unique_id(self) -> bytes:
        found = secrets.token_bytes(128)
        self.made[found], self.joined[found] = queue.Queue(), threading.Event()
        return found

    def join(self, unique_id: bytes, ranks: int) -> "Line":
        assert ranks == 3
        assert self.joined[unique_id].wait(10)
        return Line(self.made[unique_id])


@dataclass
class Line:
    waiting: queue.Queue[tuple[Tensor, threading.Event]]

    def send(self, data: Tensor) -> Callable[[], bool]:
        assert data.dtype == torch.uint8 and data.ndim == 1
        taken = threading.Event()
        self.waiting.put((data.clone(), taken))
        return taken.is_set


@dataclass
class Vllm:
    """What of vLLM's engine the routes are about, with the refusals of its worker."""

    lines: Lines
    asked: list[str] = field(default_factory=list)
    version: str = "default"
    weights: dict[str, Tensor] = field(default_factory=dict)
    line: queue.Queue[tuple[Tensor, threading.Event]] | None = None
    active: bool = False
    fails_at: int = -1
    deaf: bool = False
    puts: int = 0

    def answer(self, route: str, body: dict[str, Any]) -> Any:
        self.asked.append(route)
        match route:
            case "/weight_info":
                return {"weight_version": self.version}
            case "/get_world_size":
                return {"world_size": 2}
            case "/update_weight_version":
                self.version = body["new_version"]
            case "/weight_checker":
                self.weights = {name: torch.zeros_like(value) for name, value in self.weights.items()}
            case "/reset_prefix_cache":
                return {"success": True}
            case "/init_weight_transfer_engine":
                self.init(body["init_info"])
            case "/shutdown_weight_transfer_engine":
                assert not self.active, "Cannot release a trainer connection during a weight update"
                self.line = None
            case "/start_weight_update":
                assert not self.active, "start_weight_update called while a weight update is already active"
                self.active = True
            case "/update_weights":
                self.update(body["update_info"])
            case "/finish_weight_update":
                assert self.active, "finish_weight_update called without a matching start_weight_update."
                self.active = False
                self.version = body["weight_version"] if body else self.version
        return {}

    def init(self, info: dict[str, Any]) -> None:
        unique_id = base64.b64decode(info["nccl_unique_id_b64"], validate=True)
        assert len(unique_id) == 128 and info["packed"] and info["packed_buffer_size_bytes"] == BUCKET_BYTES
        assert (info["rank_offset"], info["world_size"]) == (1, 3)
        self.line = self.lines.made[unique_id]
        self.lines.joined[unique_id].set()

    def update(self, info: dict[str, Any]) -> None:
        """Take one broadcast apart as vLLM's consumer of packed tensors does."""
        assert self.active and self.line is not None
        self.puts += 1
        if self.deaf:
            threading.Event().wait(1)
        assert self.puts != self.fails_at, "load_weights failed"
        kinds = [getattr(torch, name) for name in info["dtype_names"]]
        sizes = [prod(shape) * kind.itemsize for shape, kind in zip(info["shapes"], kinds, strict=True)]
        assert len(sizes) == 1 or sum(sizes) <= BUCKET_BYTES, "it would be read as two broadcasts"
        data, taken = self.line.get(timeout=5)
        parts = data.split(sizes)
        for name, kind, shape, part in zip(info["names"], kinds, info["shapes"], parts, strict=True):
            self.weights[name] = part.contiguous().view(kind).view(shape)
        taken.set()


@contextmanager
def listening(engine: Vllm) -> Iterator[VllmServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}") if length else {}
            try:
                status, answer = 200, engine.answer(urlparse(self.path).path, body or {})
            except AssertionError as error:
                status, answer = 500, {"error": str(error)}
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield VllmServer(f"http://127.0.0.1:{http.server_port}", token=None, timeout_seconds=5.0)
    finally:
        http.shutdown()
        http.server_close()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Lines:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return Lines()


@pytest.fixture
def engines(lines: Lines) -> list[Vllm]:
    return [Vllm(lines), Vllm(lines)]


@pytest.fixture
def servers(engines: list[Vllm]) -> Iterator[list[VllmServer]]:
    with listening(engines[0]) as first, listening(engines[1]) as second:
        yield [first, second]


def transfer_over(lines: Lines, *, seconds: float = 5.0) -> WeightTransfer:
    return WeightTransfer(lines, bucket_bytes=BUCKET_BYTES, timeout_seconds=seconds)


def assert_has(engine: Vllm, tensors: list[tuple[str, Tensor]]) -> None:
    assert engine.weights.keys() == dict(tensors).keys()
    for name, tensor in tensors:
        assert engine.weights[name].dtype == tensor.dtype
        assert torch.equal(engine.weights[name], tensor), name


def test_every_server_gets_every_tensor_and_keeps_its_communicator(
    lines: Lines, engines: list[Vllm], servers: list[VllmServer]
) -> None:
    transfer = transfer_over(lines)
    assert transfer.send(servers, "run-1", iter(TENSORS)) == {}
    for engine, server in zip(engines, servers, strict=True):
        assert_has(engine, TENSORS)
        assert engine.version == server.weight_version() == "run-1 unfinished" and server.updates == 1
        assert engine.puts == 3
        server.name("run-1")
    changed = [(name, tensor + 1) for name, tensor in TENSORS]
    assert transfer.send(servers, "run-2", iter(changed)) == {}
    assert_has(engines[1], changed)
    assert engines[1].asked.count("/init_weight_transfer_engine") == 1
    update = engines[1].asked[engines[1].asked.index("/resume") + 1 :]
    assert [route for route in update if route not in ("/weight_info", "/update_weights")] == [
        *("/update_weight_version", "/pause", "/update_weight_version", "/weight_checker", "/start_weight_update"),
        *("/finish_weight_update", "/reset_mm_cache", "/reset_encoder_cache", "/reset_prefix_cache", "/resume"),
    ]


def test_a_server_that_fails_halfway_is_named_and_reconnected_the_next_time(
    lines: Lines, engines: list[Vllm], servers: list[VllmServer]
) -> None:
    transfer = transfer_over(lines)
    engines[0].fails_at = 2
    failed = transfer.send(servers, "run-1", iter(TENSORS))
    assert failed.keys() == {0} and "/update_weights: status 500" in failed[0] and "load_weights failed" in failed[0]
    assert engines[0].version == "run-1 unfinished" and engines[0].active
    assert_has(engines[1], TENSORS)
    assert transfer.send(servers, "run-2", iter(TENSORS)) == {}
    assert_has(engines[0], TENSORS)
    assert [engine.asked.count("/init_weight_transfer_engine") for engine in engines] == [2, 1]


def test_a_restarted_server_is_reconnected(lines: Lines, engines: list[Vllm], servers: list[VllmServer]) -> None:
    transfer = transfer_over(lines)
    assert transfer.send(servers, "run-1", iter(TENSORS)) == {}
    engines[0].version, engines[0].line, engines[0].weights = "default", None, {}
    assert transfer.send(servers, "run-2", iter(TENSORS)) == {}
    assert_has(engines[0], TENSORS)
    assert "/shutdown_weight_transfer_engine" not in engines[0].asked


def test_a_bucket_that_is_not_taken_in_time_ends_the_update_of_its_server(
    lines: Lines, engines: list[Vllm], servers: list[VllmServer]
) -> None:
    engines[1].deaf = True
    failed = transfer_over(lines, seconds=0.2).send(servers, "run-1", iter(TENSORS))
    assert failed.keys() == {1} and "/update_weights: not done within 0.2 s" in failed[1]


def test_a_tensor_too_large_for_a_broadcast_is_named_with_the_way_around_it(
    lines: Lines, servers: list[VllmServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_module, "MOST_BYTES", 300)
    with pytest.raises(WeightsError, match=r"embed has 308 bytes, more .*set rollout\.vllm\.weight_sync=directory"):
        transfer_over(lines).send(servers, "run-1", iter(TENSORS))
