"""JSON over HTTP to a server that may be slow, busy or gone: how a request fails, and when it is sent again."""

from http import HTTPStatus
from typing import Any, Final

import requests
from urllib3.util import Retry

_TRIED_AGAIN: Final = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
CONNECT_SECONDS: Final = 10.0
LONGEST_PAUSE_SECONDS: Final = 30.0
_SHOWN_CHARACTERS: Final = 300


class Unreachable(RuntimeError):
    """The server did not answer, or asked to be asked again."""

    def __init__(self, message: str, *, status: int | None = None, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_seconds = retry_after_seconds


class Refused(ValueError):
    """The server will not answer this request, however often it is asked."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class JsonServer:
    """One server by its address.

    >>> JsonServer("http://127.0.0.1:8000", token=None, timeout_seconds=60).get("/version")
    """

    def __init__(self, url: str, *, token: str | None, timeout_seconds: float) -> None:
        self.url = url.rstrip("/")
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout = (min(CONNECT_SECONDS, timeout_seconds), timeout_seconds)

    def get(self, path: str) -> Any:
        """The decoded answer; Unreachable or Refused if there is none."""
        return self._ask("GET", path, None, None)

    def post(self, path: str, body: dict[str, Any] | None = None, **query: str) -> Any:
        """The decoded answer, None if it is empty; Unreachable or Refused if there is none."""
        return self._ask("POST", path, body, query)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, query: dict[str, str] | None) -> Any:
        url = f"{self.url}{path}"
        try:
            response = requests.request(
                method, url, json=body, params=query, headers=self._headers, timeout=self._timeout
            )
        except requests.RequestException as error:
            raise Unreachable(f"{url}: {error}") from error
        status = response.status_code
        shown = f"{url}: status {status}: {response.text[:_SHOWN_CHARACTERS]}"
        if status in _TRIED_AGAIN or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            wait = _seconds(response.headers.get("Retry-After"))
            raise Unreachable(shown, status=status, retry_after_seconds=wait)
        if status != HTTPStatus.OK:
            raise Refused(shown, status=status)
        if not response.content:
            return None
        try:
            return response.json()
        except requests.exceptions.JSONDecodeError as error:
            raise Refused(
                f"{url}: the answer is no JSON: {response.text[:_SHOWN_CHARACTERS]!r}", status=status
            ) from error


class Pauses:
    """Growing pauses between the attempts of one request, varied at random; nothing else depends on them."""

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
        """Seconds to wait after another failure; no less than the server asked for."""
        self._retry = self._retry.increment("POST", "")
        asked = 0.0 if failure is None else failure.retry_after_seconds
        return max(self._retry.get_backoff_time(), asked)


def _seconds(header: str | None) -> float:
    """A Retry-After in seconds; dates count as none."""
    return float(header) if header is not None and header.isdecimal() else 0.0
