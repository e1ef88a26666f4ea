"""Requests to a rollout server, and the three ways in which they fail."""

from http import HTTPStatus
from typing import Any, Final

_TRIED_AGAIN: Final = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
CONNECT_SECONDS: Final = 10.0
_SHOWN_CHARACTERS: Final = 300


class RolloutUnavailable(RuntimeError):
    """No completions can be had, or no server has the weights: the run has to save and stop."""


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


class ServerConnection:
    """One server by its address."""

    def __init__(self, url: str, *, token: str | None, timeout_seconds: float) -> None:
        self.url = url.rstrip("/")
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout = (min(CONNECT_SECONDS, timeout_seconds), timeout_seconds)

    def get(self, path: str) -> dict[str, Any]:
        """The JSON answer; Unreachable or Refused where there is none."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON answer; Unreachable or Refused where there is none."""
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        import requests

        try:
            response = requests.request(
                method, f"{self.url}{path}", json=body, headers=self._headers, timeout=self._timeout
            )
            status = response.status_code
            if status in _TRIED_AGAIN or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                raise Unreachable(
                    f"status {status}: {response.text[:_SHOWN_CHARACTERS]}",
                    status=status,
                    retry_after_seconds=_seconds(response.headers.get("Retry-After")),
                )
            if status != HTTPStatus.OK:
                raise Refused(f"{self.url}{path}: status {status}: {response.text[:_SHOWN_CHARACTERS]}", status=status)
            answer: dict[str, Any] = response.json()
        except requests.RequestException as error:
            raise Unreachable(str(error)) from error
        return answer


def _seconds(header: str | None) -> float:
    """A Retry-After in seconds; dates, which no server here sends, count as none."""
    return float(header) if header is not None and header.isdecimal() else 0.0
