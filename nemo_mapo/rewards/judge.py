"""Models behind an OpenAI-compatible server that help to score: a chat model as judge, and an embedding model."""

import os
import re
import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from nemo_mapo.config.rewards import JudgeConfig
from nemo_mapo.console import Unavailable
from nemo_mapo.http_client import JsonServer, Pauses, Refused, Unreachable

_CONTROL = re.compile(r"<(?=\||/?s>|(?:start|end)_of_turn>)|\[(?=/?INST\])", re.IGNORECASE)
"""Start of a chat model's control token: `<|im_end|>`, `</s>`, `<end_of_turn>`, `[/INST]`."""
_LARGEST_ANSWER_BYTES = 16 << 20
"""A reply has a few hundred words, a batch of embeddings a few megabytes."""


class JudgeError(Unavailable):
    """The server cannot be reached, refuses, or sends an invalid response; nothing was scored."""


class JudgeUnreachable(JudgeError):
    """All attempts failed for temporary reasons: time-outs, broken connections, 429, 5xx."""


def spelled_apart(text: str) -> str:
    """A text without control tokens for any server's tokenizer; otherwise a completion could end the judge's prompt."""
    return _CONTROL.sub(lambda match: f"{match.group()} ", text)


@runtime_checkable
class ChatModel(Protocol):
    """Answers a prompt."""

    @property
    def name(self) -> str:
        """Its name in the results."""
        ...

    def chat(self, system: str, prompt: str) -> str:
        """Return the reply; JudgeError when there is none."""
        ...


@runtime_checkable
class EmbeddingModel(Protocol):
    """Embeds texts."""

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Return one vector per text, in order; JudgeError if there are none."""
        ...


class OpenAIClient:
    """A `ChatModel` and an `EmbeddingModel` over HTTP.

    Every request has a time limit. Time-outs, broken connections, 429 and 5xx are retried with growing pauses,
    `max_attempts` times in all, before JudgeUnreachable; any other HTTP error is a JudgeError at once. An outage never
    becomes a value.
    """

    def __init__(self, config: JudgeConfig) -> None:
        """ValueError when the config names no server."""
        if config.base_url is None:
            raise ValueError(
                "judge.base_url is not set: give the address of an OpenAI-compatible server, e.g. http://HOST:8000/v1"
            )
        self._config = config
        self._base_url = config.base_url.rstrip("/")
        key = os.environ.get(config.api_key_variable)
        self._server = JsonServer(
            self._base_url,
            token=key or None,
            timeout_seconds=config.timeout_seconds,
            largest_bytes=_LARGEST_ANSWER_BYTES,
        )

    @property
    def name(self) -> str:
        """The chat model's name on the server."""
        return str(self._config.model)

    def chat(self, system: str, prompt: str) -> str:
        """Return the reply of the chat model; control tokens in `prompt`, which quotes completions, are broken up."""
        if self._config.model is None:
            raise ValueError("judge.model is not set: name the chat model that judges")
        answer = self._post(
            "chat/completions",
            {
                "model": self._config.model,
                "messages": [{"role": "system", "content": system}, {"role": "user", "content": spelled_apart(prompt)}],
                "temperature": self._config.temperature,
                "max_tokens": self._config.max_tokens,
            },
        )
        try:
            reply = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise JudgeError(f"judge at {self._base_url}: no chat completion in {str(answer)[:200]}") from error
        if not isinstance(reply, str):
            raise JudgeError(f"judge at {self._base_url}: the reply is {reply!r}, not a text")
        return reply

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Return the embedding model's vectors."""
        if self._config.embedding_model is None:
            raise ValueError("judge.embedding_model is not set: name the model that embeds answers and choices")
        answer = self._post("embeddings", {"model": self._config.embedding_model, "input": list(texts)})
        try:
            rows = sorted(answer["data"], key=lambda row: row["index"])
            vectors = [[float(value) for value in row["embedding"]] for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise JudgeError(f"judge at {self._base_url}: no embeddings in {str(answer)[:200]}") from error
        if len(vectors) != len(texts):
            raise JudgeError(f"judge at {self._base_url}: {len(vectors)} embeddings for {len(texts)} texts")
        return vectors

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        pauses, pause, failure = Pauses(self._config.pause_seconds), 0.0, ""
        for _ in range(self._config.max_attempts):
            time.sleep(pause)
            try:
                return self._server.post(f"/{path}", body)
            except Unreachable as error:
                failure, pause = str(error), pauses.next(error)
            except Refused as error:
                raise JudgeError(str(error)) from error
        raise JudgeUnreachable(f"judge: {self._config.max_attempts} attempts failed, the last with: {failure}")
