"""JSON over HTTP to a server that may be slow, busy, broken or gone: how a request fails, and when to retry it."""

import json
import logging
import socket
import threading
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

logger = logging.getLogger(__name__)

_TRIED_AGAIN: Final = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
CONNECT_SECONDS: Final = 10.0
LONGEST_PAUSE_SECONDS: Final = 30.0
LONGEST_ASKED_PAUSE_SECONDS: Final = 600.0
"""Longest Retry-After that is honoured; a longer one is treated as this."""
LARGEST_ANSWER_BYTES: Final = 256 << 20
"""Far more than the log-probs of a batch of the longest completions."""
_BLOCK_BYTES: Final = 1 << 16
_SHOWN_CHARACTERS: Final = 300


class Unreachable(RuntimeError):
    """The server did not answer, or cannot serve the request at the moment."""

    def __init__(self, message: str, *, status: int | None = None, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_seconds = retry_after_seconds


class Refused(ValueError):
    """The server rejects this request, and a retry would not change that."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class JsonServer:
    """A JSON server at one address.

    >>> JsonServer("http://127.0.0.1:8000", token=None, timeout_seconds=60).get("/version")

    `timeout_seconds` limits a request from its start to the last byte of the answer, however the bytes arrive, and
    `largest_bytes` limits the answer. Compressed answers are neither requested nor unpacked. The first unanswered
    request of an outage is logged, because callers may retry for minutes; an `expected` outage is not.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        timeout_seconds: float,
        largest_bytes: int = LARGEST_ANSWER_BYTES,
        expected: bool = False,
    ) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Accept-Encoding": "identity"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._seconds = timeout_seconds
        self._largest = largest_bytes
        self._said = expected
        self._expected = expected

    def get(self, path: str) -> Any:
        """The decoded answer; Unreachable or Refused if there is none."""
        return self._ask("GET", path, None, None)

    def post(self, path: str, body: dict[str, Any] | None = None, **query: str) -> Any:
        """The decoded answer, None if it is empty; Unreachable or Refused if there is none."""
        return self._ask("POST", path, body, query)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, query: dict[str, str] | None) -> Any:
        try:
            answer = self._answer(method, path, body, query)
        except Unreachable as error:
            if error.status is None and not self._said:
                self._said = True
                logger.warning(f"{self.url} does not answer; retrying for a while: {error}")
            raise
        self._said = self._expected
        return answer

    def _answer(self, method: str, path: str, body: dict[str, Any] | None, query: dict[str, str] | None) -> Any:
        url = f"{self.url}{path}"
        with _Deadline(self._seconds) as deadline, requests.Session() as session:
            session.mount(url, _WatchedAdapter(deadline))
            try:
                response = session.request(
                    method,
                    url,
                    json=body,
                    params=query,
                    headers=self._headers,
                    timeout=(min(CONNECT_SECONDS, self._seconds), self._seconds),
                    stream=True,
                )
                content = self._content(response, url)
            except (requests.RequestException, HTTPError, OSError) as error:
                late = f"no complete answer within {self._seconds:g} s" if deadline.passed else str(error)
                raise Unreachable(f"{url}: {late}") from error
        # A truncated answer may look complete.
        if deadline.passed:
            raise Unreachable(f"{url}: no complete answer within {self._seconds:g} s")
        return _decoded(content, response, url)

    def _content(self, response: requests.Response, url: str) -> bytes:
        status = response.status_code
        if coding := response.headers.get("Content-Encoding"):
            raise Refused(f"{url}: the answer is compressed ({coding}), which was not requested", status=status)
        content = bytearray()
        while block := response.raw.read1(_BLOCK_BYTES):
            content += block
            if len(content) > self._largest:
                raise Refused(f"{url}: the answer has more than {self._largest} bytes", status=status)
        return bytes(content)


def _decoded(content: bytes, response: requests.Response, url: str) -> Any:
    status, text = response.status_code, content[: 4 * _SHOWN_CHARACTERS].decode(errors="replace")
    shown = f"{url}: status {status}: {text[:_SHOWN_CHARACTERS]}"
    if status in _TRIED_AGAIN or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        wait = _seconds(response.headers.get("Retry-After"))
        raise Unreachable(shown, status=status, retry_after_seconds=wait)
    if status != HTTPStatus.OK:
        raise Refused(shown, status=status)
    if not content:
        return None
    try:
        return decode_json(content)
    except ValueError as error:
        raise Refused(f"{url}: the answer is not JSON: {text[:_SHOWN_CHARACTERS]!r}", status=status) from error


def decode_json(content: str | bytes) -> Any:
    """Decode untrusted JSON; ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


class _Deadline:
    """Shuts its connections down when the time is up; a timeout of `requests` only limits the gap between two bytes."""

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._pass)
        self._timer.daemon = True

    def watch(self, connected: socket.socket) -> None:
        """Shut a connection down when the time is up, or now if it is."""
        with self._lock:
            self._sockets.append(connected)
            if self.passed:
                _shut_down(connected)

    def _pass(self) -> None:
        with self._lock:
            self.passed = True
            for connected in self._sockets:
                _shut_down(connected)

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()


def _shut_down(connected: socket.socket) -> None:
    with suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


class _WatchedAdapter(HTTPAdapter):
    """Makes the connections of one request and registers each with its deadline."""

    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()

        class Plain(HTTPConnection):
            def connect(self) -> None:
                super().connect()
                deadline.watch(self.sock)

        class Secure(HTTPSConnection):
            def connect(self) -> None:
                super().connect()
                deadline.watch(self.sock)

        class PlainPool(HTTPConnectionPool):
            ConnectionCls = Plain

        class SecurePool(HTTPSConnectionPool):
            ConnectionCls = Secure

        self.poolmanager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}


class Pauses:
    """Growing pauses with random jitter between the attempts of one request; no result depends on them."""

    def __init__(self, pause_seconds: float) -> None:
        """`pause_seconds` is the longest first pause; each further one is up to twice as long, up to 30 s."""
        # urllib3 makes no pause after a first failure; it counts the failures in its history.
        self._retry = Retry(
            total=None,
            backoff_factor=pause_seconds / 2,
            backoff_max=LONGEST_PAUSE_SECONDS,
            backoff_jitter=pause_seconds / 2,
        ).increment("POST", "")

    def next(self, failure: Unreachable | None = None) -> float:
        """Seconds to wait after another failure; at least what the server asked for, up to a limit."""
        self._retry = self._retry.increment("POST", "")
        asked = 0.0 if failure is None else failure.retry_after_seconds
        return max(self._retry.get_backoff_time(), min(asked, LONGEST_ASKED_PAUSE_SECONDS))


def _seconds(header: str | None) -> float:
    """Seconds from now that a Retry-After header (a number or a date) asks for; 0 for anything else."""
    if header is None or header.isdecimal():
        return float(header or 0)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0
