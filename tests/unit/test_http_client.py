"""How requests fail, and when they are sent again, against a scripted HTTP server."""

import gzip
import select
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from nemo_mapo.http_client import (
    LONGEST_ASKED_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    JsonServer,
    Pauses,
    Refused,
    Unreachable,
)
from tests.chat_server import Server, serve

__all__ = ["serve"]

Serve = Callable[[Callable[[str, dict[str, Any]], Any]], Server]


def connection(server: Server) -> JsonServer:
    return JsonServer(server.base_url.removesuffix("/v1"), token="key", timeout_seconds=5.0)


def test_a_key_and_a_json_body_are_sent(serve: Serve) -> None:
    server = serve(lambda path, body: (200, {"echo": body}))
    assert connection(server).post("/v1/x", {"a": 1}) == {"echo": {"a": 1}}
    assert server.requests == [("/v1/x", {"a": 1}, "Bearer key")]


def test_an_empty_answer_is_none(serve: Serve) -> None:
    assert connection(serve(lambda path, body: (200, ""))).post("/v1/x", {}) is None


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_server_in_trouble_can_be_asked_again(serve: Serve, status: int) -> None:
    with pytest.raises(Unreachable, match=f"status {status}: in trouble"):
        connection(serve(lambda path, body: (status, "in trouble"))).post("/v1/x", {})


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422])
def test_a_refusal_is_final(serve: Serve, status: int) -> None:
    with pytest.raises(Refused, match=f"status {status}: no") as refused:
        connection(serve(lambda path, body: (status, "no"))).post("/v1/x", {})
    assert refused.value.status == status


def test_a_reply_that_is_not_json_is_not_an_answer(serve: Serve) -> None:
    with pytest.raises(Refused, match="not JSON: '<html>'"):
        connection(serve(lambda path, body: (200, "<html>"))).post("/v1/x", {})


def test_nobody_listening_is_unreachable() -> None:
    with pytest.raises(Unreachable, match=r"http://127\.0\.0\.1:1/x"):
        JsonServer("http://127.0.0.1:1", token=None, timeout_seconds=1.0).get("/x")


def test_an_outage_is_said_once_and_not_where_it_is_expected(caplog) -> None:
    for expected in (False, True):
        server = JsonServer("http://127.0.0.1:1", token=None, timeout_seconds=1.0, expected=expected)
        for _ in range(3):
            with pytest.raises(Unreachable):
                server.get("/x")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "http://127.0.0.1:1 does not answer; retrying" in caplog.text


BROKEN = {
    "a trickle of a body": (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"1"),
    "a trickle of headers": (b"HTTP/1.1 200 OK\r\nX: ", b"a"),
    "silence": (b"", b""),
    "chunks without an end": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n1\r\n"),
}


class Raw:
    """A server that sends bytes, and then others again and again, to whoever connects; after 400 times it hangs up."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.over = threading.Event()
        self.client_hung_up = threading.Event()

    def start(self, head: bytes, again: bytes, pause: float = 0.05) -> JsonServer:
        threading.Thread(target=self._send, args=(head, again, pause), daemon=True).start()
        url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        return JsonServer(url, token=None, timeout_seconds=1.0, largest_bytes=1 << 20)

    def _send(self, head: bytes, again: bytes, pause: float) -> None:
        connected, _ = self.listening.accept()
        with connected:
            try:
                connected.sendall(head)
                for _ in range(400):
                    if self.over.wait(pause):
                        return
                    connected.sendall(again)
                    if select.select([connected], [], [], 0)[0] and not connected.recv(1 << 16):
                        raise ConnectionResetError
            except OSError:
                self.client_hung_up.set()


@pytest.fixture
def raw(monkeypatch) -> Iterator[Raw]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Raw()
    yield server
    server.over.set()
    server.listening.close()


@pytest.mark.parametrize("kind", BROKEN)
def test_an_answer_has_its_time_however_its_bytes_arrive(raw: Raw, kind: str) -> None:
    """With a time-out between two bytes only, all of these but silence would last as long as the server likes."""
    with pytest.raises(Unreachable, match=r"no complete answer within 1 s|timed out"):
        raw.start(*BROKEN[kind]).get("/x")
    assert raw.client_hung_up.wait(10)


def test_a_body_without_an_end_is_refused_at_the_limit(raw: Raw) -> None:
    with pytest.raises(Refused, match="more than 1048576 bytes"):
        raw.start(b"HTTP/1.1 200 OK\r\n\r\n", b" " * (1 << 18), 0.001).get("/x")


def test_a_compressed_body_is_not_unpacked(raw: Raw) -> None:
    bomb = gzip.compress(bytes(1 << 24))
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n".encode()
    with pytest.raises(Refused, match=r"compressed \(gzip\), which was not requested"):
        raw.start(head + bomb, b"").get("/x")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, '"\x00'])
def test_what_cannot_be_read_as_json_is_refused(serve: Serve, content: str) -> None:
    with pytest.raises(Refused, match="not JSON"):
        connection(serve(lambda path, body: (200, content))).post("/v1/x", {})


def test_pauses_grow_to_a_limit_and_vary() -> None:
    rows = []
    for _ in range(20):
        pauses = Pauses(1.0)
        rows.append([pauses.next() for _ in range(8)])
    for attempt in range(8):
        longest = min(2.0**attempt, LONGEST_PAUSE_SECONDS)
        found = [row[attempt] for row in rows]
        assert min(found) > 0 and max(found) <= max(longest, 1.0) + 0.5
    assert len({row[0] for row in rows}) > 1
    assert min(row[7] for row in rows) == LONGEST_PAUSE_SECONDS


def test_a_server_that_says_when_to_come_back_is_waited_for_within_reason() -> None:
    assert Pauses(0.01).next(Unreachable("busy", retry_after_seconds=7.0)) == 7.0
    a_day = Unreachable("busy", retry_after_seconds=86400.0)
    assert Pauses(0.01).next(a_day) == LONGEST_ASKED_PAUSE_SECONDS


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [("7", 7, 7), ("in an hour", 3000, 3600), ("soon", 0, 0), ("-3", 0, 0)],
)
def test_retry_after_is_a_number_or_a_date(raw: Raw, header: str, low: float, high: float) -> None:
    if header == "in an hour":
        header = format_datetime(datetime.now(UTC) + timedelta(hours=1))
    head = f"HTTP/1.1 429 Too Many Requests\r\nRetry-After: {header}\r\nContent-Length: 0\r\n\r\n".encode()
    with pytest.raises(Unreachable) as caught:
        raw.start(head, b"").get("/x")
    assert low <= caught.value.retry_after_seconds <= high
