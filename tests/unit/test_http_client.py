"""How requests fail, and when they are sent again, against a scripted HTTP server."""

from collections.abc import Callable
from typing import Any

import pytest

from nemo_mapo.http_client import LONGEST_PAUSE_SECONDS, JsonServer, Pauses, Refused, Unreachable
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


def test_what_is_no_json_is_no_answer(serve: Serve) -> None:
    with pytest.raises(Refused, match="no JSON: '<html>'"):
        connection(serve(lambda path, body: (200, "<html>"))).post("/v1/x", {})


def test_nobody_listening_is_unreachable() -> None:
    with pytest.raises(Unreachable, match=r"http://127\.0\.0\.1:1/x"):
        JsonServer("http://127.0.0.1:1", token=None, timeout_seconds=1.0).get("/x")


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


def test_a_server_that_says_when_to_come_back_is_waited_for() -> None:
    assert Pauses(0.01).next(Unreachable("busy", retry_after_seconds=7.0)) == 7.0
