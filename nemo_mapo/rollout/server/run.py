"""Runs a rollout server until SIGTERM, then lets what is under way end."""

import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable

import uvicorn

from nemo_mapo.config.rollout import ServingConfig
from nemo_mapo.rollout.server.app import RolloutApp
from nemo_mapo.rollout.server.chat import PromptReader
from nemo_mapo.rollout.server.engine import RolloutEngine, WeightId
from nemo_mapo.rollout.server.policy import ServedPolicy

logger = logging.getLogger(__name__)


class _Draining(uvicorn.Server):
    """Tells the app when it is to take no further requests on connections that stay open."""

    def __init__(self, config: uvicorn.Config, app: RolloutApp) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: object) -> None:
        """On SIGTERM and SIGINT."""
        self._app.draining = True
        super().handle_exit(sig, frame)  # type: ignore[arg-type]


def serve(
    policy: ServedPolicy,
    config: ServingConfig,
    *,
    sample_rate: int,
    weights: WeightId | None,
    announce: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        policy: what generates.
        config: how to listen.
        sample_rate: of the model's audio, Hz.
        weights: names those that the policy has; None waits for the first update.
        announce: is told the address as soon as connections are taken.

    Raises:
        ValueError: no token where one is needed, or the address cannot be listened at.
    """
    token = os.environ.get(config.token_variable) or None
    if token is None and not _is_loopback(config.host):
        raise ValueError(
            f"serving.host={config.host} can be reached from other machines: set the environment variable "
            f"{config.token_variable} to a token, here and for the trainer"
        )
    rollout = policy.rollout
    engine = RolloutEngine(
        policy,
        pad_id=rollout.pad_id,
        batch_size=rollout.batch_size,
        max_waiting=config.max_waiting,
        batching_seconds=config.batching_seconds,
        weights=weights,
    )
    reader = PromptReader(
        tokenizer=rollout.tokenizer,
        audio_tokens=policy.model.num_audio_tokens,
        sample_rate=sample_rate,
        max_length=policy.capabilities.max_length,
        max_group=rollout.batch_size,
    )
    app = RolloutApp(engine, reader, policy.capabilities, config, token=token)
    listening = _listen(config)
    server = _Draining(
        uvicorn.Config(
            app.asgi(),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=round(config.drain_seconds),
        ),
        app,
    )
    # uvicorn raises the signal again when it has drained; the process is to end by itself then.
    signal.signal(signal.SIGTERM, lambda *_: None)
    announce(f"http://{config.host}:{listening.getsockname()[1]}")
    server.run(sockets=[listening])
    engine.stop()
    logger.info("drained")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(config: ServingConfig) -> socket.socket:
    try:
        return socket.create_server((config.host, config.port))
    except OSError as error:
        raise ValueError(f"serving.host={config.host} serving.port={config.port}: {error.strerror}") from error
