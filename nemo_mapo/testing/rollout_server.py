"""Real rollout servers of the tiny model, in processes of their own: for tests of what happens over HTTP."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
from jaxtyping import Int
from torch import Tensor

from nemo_mapo.config.rollout import ServingConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rollout.server.engine import WeightId
from nemo_mapo.rollout.server.policy import ServedPolicy
from nemo_mapo.rollout.server.run import serve
from nemo_mapo.testing.tiny import SAMPLE_RATE, tiny_audio_llm
from nemo_mapo.types import PromptBatch, Rollouts

START_DIGEST = "as built"
_START_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class RunningServer:
    """A server that takes connections."""

    url: str
    process: BaseProcess


class SlowPolicy(ServedPolicy):
    """Takes `seconds` longer for each batch than it needs to."""

    def __init__(self, rollout: MegatronRollout, *, seconds: float) -> None:
        super().__init__(rollout)
        self._seconds = seconds

    def generate(
        self, prompts: PromptBatch, sampling: SamplingConfig, *, group_size: int, seeds: Int[Tensor, " batch"]
    ) -> Rollouts:
        """Sleep, then sample."""
        time.sleep(self._seconds)
        return super().generate(prompts, sampling, group_size=group_size, seeds=seeds)


@contextmanager
def tiny_server(
    config: ServingConfig,
    *,
    model_seed: int = 0,
    with_weights: bool = True,
    slow_seconds: float = 0.0,
    token: str = "",
) -> Iterator[RunningServer]:
    """A server of `tiny_audio_llm(seed=model_seed)`; killed at the end, if it still runs.

    Without `with_weights` it waits for a first update; else its weights are version 0 with START_DIGEST.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(config, model_seed, with_weights, slow_seconds, token, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(_START_SECONDS):
            raise RuntimeError(f"the server did not start within {_START_SECONDS} s")
        yield RunningServer(url=receiver.recv(), process=process)
    finally:
        process.kill()
        process.join()


def _run(
    config: ServingConfig, model_seed: int, with_weights: bool, slow_seconds: float, token: str, sender: Connection
) -> None:
    os.environ[config.token_variable] = token
    torch.set_num_threads(1)
    tiny = tiny_audio_llm(seed=model_seed)
    announce: Callable[[str], None] = sender.send
    serve(
        SlowPolicy(MegatronRollout(tiny.model, tiny.tokenizer, batch_size=16), seconds=slow_seconds),
        config,
        sample_rate=SAMPLE_RATE,
        weights=WeightId(version=0, digest=START_DIGEST) if with_weights else None,
        announce=announce,
    )
