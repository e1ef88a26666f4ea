"""A real HTTP server that plays an OpenAI-compatible one, reply by scripted reply."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nemo_mapo.config.rewards import JudgeConfig

Reply = tuple[int, Any]
"""Status and JSON body (a text is sent as it is)."""


@dataclass
class Server:
    """Answers requests with `reply`, and remembers them."""

    reply: Callable[[str, dict[str, Any]], Reply]
    base_url: str = ""
    requests: list[tuple[str, dict[str, Any], str | None]] = field(default_factory=list)

    def config(self, **changes: Any) -> JudgeConfig:
        return JudgeConfig(
            **{"base_url": self.base_url, "model": "judge", "pause_seconds": 0.0, "timeout_seconds": 5.0, **changes}
        )


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str, dict[str, Any]], Reply]], Server]]:
    """Start a server whose replies a function of path and body makes."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started: list[ThreadingHTTPServer] = []

    def start(reply: Callable[[str, dict[str, Any]], Reply]) -> Server:
        server = Server(reply)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, body, self.headers.get("Authorization")))
                status, content = server.reply(self.path, body)
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        started.append(http)
        server.base_url = f"http://127.0.0.1:{http.server_port}/v1"
        return server

    yield start
    for http in started:
        http.shutdown()
        http.server_close()


def chat_reply(text: str) -> Reply:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}
