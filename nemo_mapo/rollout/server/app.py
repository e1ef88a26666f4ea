"""The HTTP face of a rollout engine: routes, the token, limits, metrics."""

import asyncio
import dataclasses
import hmac
import logging
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, ValidationError

from nemo_mapo.config.rollout import ServingConfig
from nemo_mapo.rollout.protocol import Capabilities
from nemo_mapo.rollout.server.chat import ChatRequest, PromptReader, chat_answer
from nemo_mapo.rollout.server.engine import (
    EngineFull,
    NotServing,
    OtherVersion,
    RolloutEngine,
    TooLate,
    WeightId,
)
from nemo_mapo.rollout.weight_sync import (
    ProcessGroupAddress,
    Weights,
    WeightSyncError,
    read_update,
    receive_update,
)

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1
Handler = Callable[[Request], Awaitable[Response]]
Body = TypeVar("Body", bound=BaseModel)


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class WeightUpdate(BaseModel):
    """Body of POST /v1/weights: which version, and the one way by which it comes."""

    model_config = ConfigDict(extra="forbid")
    version: int
    directory: str | None = None
    """Name of an update in the server's sync_dir."""
    process_group: ProcessGroupAddress | None = None


class RolloutApp:
    """Routes of one server."""

    def __init__(
        self,
        engine: RolloutEngine,
        reader: PromptReader,
        capabilities: Capabilities,
        config: ServingConfig,
        *,
        token: str | None,
    ) -> None:
        """`token` is what requests must bear; None asks for none."""
        self.engine = engine
        self.draining = False
        self._reader = reader
        self._capabilities = capabilities
        self._config = config
        self._token = token
        self._requests: Counter[tuple[str, int]] = Counter()
        self._updating = threading.Lock()

    def asgi(self) -> FastAPI:
        """The application that a web server runs."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        routes: tuple[tuple[str, str, Handler, bool], ...] = (
            ("GET", "/health", self._health, True),
            ("GET", "/metrics", self._metrics, False),
            ("GET", "/v1/models", self._models, False),
            ("GET", "/v1/weights", self._weights, False),
            ("POST", "/v1/weights", self._update, False),
            ("POST", "/v1/chat/completions", self._chat, False),
        )
        for method, path, handler, is_open in routes:
            app.add_api_route(path, self._guarded(path, handler, is_open), methods=[method], response_model=None)
        return app

    def _guarded(self, path: str, handler: Handler, is_open: bool) -> Handler:
        async def endpoint(request: Request) -> Response:
            try:
                if not is_open:
                    self._check_token(request)
                response = await handler(request)
            except Refusal as refusal:
                response = _refused(refusal)
            self._requests[path, response.status_code] += 1
            return response

        return endpoint

    def _check_token(self, request: Request) -> None:
        if self._token is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise Refusal(HTTPStatus.UNAUTHORIZED, "the bearer token is missing or wrong")

    async def _health(self, request: Request) -> Response:
        state = "draining" if self.draining else self.engine.state
        healthy = state == "serving"
        return JSONResponse({"status": state}, HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE)

    async def _models(self, request: Request) -> Response:
        model = {"id": self._config.model_name, "object": "model", "created": 0, "owned_by": "nemo_mapo"}
        return JSONResponse({"object": "list", "data": [model | {"nemo_mapo": vars(self._capabilities)}]})

    async def _weights(self, request: Request) -> Response:
        return JSONResponse({"state": self.engine.state, **_weights_json(self.engine.weights)})

    async def _update(self, request: Request) -> Response:
        update = await self._parsed(request, WeightUpdate)
        if not self._updating.acquire(blocking=False):
            raise Refusal(HTTPStatus.CONFLICT, "another update is under way")
        try:
            weights = await asyncio.to_thread(self._arrived, update)
            taken = await asyncio.wrap_future(self.engine.change_weights(weights))
        except (WeightSyncError, ValueError) as error:
            self.engine.updates["failed"] += isinstance(error, WeightSyncError)
            logger.error(f"the update to version {update.version} failed: {error}")
            raise Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, f"version {update.version}: {error}") from error
        except NotServing as error:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from error
        except RuntimeError as error:
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, f"version {update.version}: {error}") from error
        finally:
            self._updating.release()
        logger.info(f"weights: version {taken.version} ({taken.digest[:12]})")
        return JSONResponse(_weights_json(taken))

    def _arrived(self, update: WeightUpdate) -> Weights:
        """Wait for a whole update; WeightSyncError where it does not come."""
        if update.process_group is not None and update.directory is None:
            return receive_update(update.process_group, update.version)
        if update.directory is None or update.process_group is not None:
            raise WeightSyncError("give one of directory and process_group")
        if self._config.sync_dir is None:
            raise WeightSyncError("this server was started without sync_dir, so it reads no update from a directory")
        return read_update(Path(self._config.sync_dir), update.directory, update.version)

    async def _chat(self, request: Request) -> Response:
        if self.draining:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "draining")
        deadline = time.monotonic() + self._config.request_timeout_seconds
        asked = await self._parsed(request, ChatRequest)
        if asked.model != self._config.model_name:
            raise Refusal(HTTPStatus.NOT_FOUND, f"model {asked.model!r} is not served, {self._config.model_name!r} is")
        try:
            job = await asyncio.to_thread(self._reader.job, asked, deadline=deadline)
            done = asyncio.wrap_future(self.engine.submit(job))
            completions = await asyncio.wait_for(done, timeout=max(deadline - time.monotonic(), 0))
        except ValueError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from error
        except EngineFull as error:
            raise Refusal(HTTPStatus.TOO_MANY_REQUESTS, str(error)) from error
        except NotServing as error:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from error
        except OtherVersion as error:
            raise Refusal(HTTPStatus.CONFLICT, str(error)) from error
        except (TooLate, TimeoutError) as error:
            raise Refusal(HTTPStatus.GATEWAY_TIMEOUT, "the request's time has run out") from error
        except (ArithmeticError, RuntimeError) as error:
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)) from error
        return JSONResponse(chat_answer(asked, job, completions))

    async def _parsed(self, request: Request, kind: type[Body]) -> Body:
        try:
            async with asyncio.timeout(self._config.request_timeout_seconds):
                content = await self._body(request)
            return kind.model_validate_json(content)
        except TimeoutError as error:
            raise Refusal(HTTPStatus.REQUEST_TIMEOUT, "the body did not arrive in time") from error
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False)]
            raise Refusal(HTTPStatus.BAD_REQUEST, "; ".join(problems)) from error

    async def _body(self, request: Request) -> bytes:
        """Read the body, no further than the limit."""
        limit = self._config.max_request_megabytes * 2**20
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > limit:
                raise Refusal(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    f"the request is larger than max_request_megabytes={self._config.max_request_megabytes}",
                )
        return bytes(content)

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(self._metrics_text(), media_type="text/plain; version=0.0.4")

    def _metrics_text(self) -> str:
        engine = self.engine
        lines = ["# TYPE nemo_mapo_requests_total counter"]
        for (path, status), count in sorted(self._requests.items()):
            lines.append(f'nemo_mapo_requests_total{{path="{path}",status="{status}"}} {count}')
        lines.append("# TYPE nemo_mapo_weight_updates_total counter")
        lines += [f'nemo_mapo_weight_updates_total{{result="{result}"}} {n}' for result, n in engine.updates.items()]
        version = -1 if engine.weights is None else engine.weights.version
        for name, kind, value in (
            ("generated_tokens_total", "counter", engine.generated_tokens),
            ("generated_completions_total", "counter", engine.generated_completions),
            ("engine_busy_seconds_total", "counter", engine.busy_seconds),
            ("waiting_completions", "gauge", engine.waiting),
            ("weight_version", "gauge", version),
            ("serving", "gauge", int(engine.state == "serving" and not self.draining)),
        ):
            lines += [f"# TYPE nemo_mapo_{name} {kind}", f"nemo_mapo_{name} {value}"]
        return "\n".join(lines) + "\n"


def _weights_json(weights: WeightId | None) -> dict[str, Any]:
    return {"version": None, "digest": None} if weights is None else dataclasses.asdict(weights)


def _refused(refusal: Refusal) -> Response:
    busy = refusal.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
    return JSONResponse(
        {"error": {"message": str(refusal), "type": refusal.status.phrase.lower().replace(" ", "_")}},
        refusal.status,
        {"Retry-After": str(RETRY_AFTER_SECONDS)} if busy else None,
    )
