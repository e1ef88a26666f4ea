"""What the ranks of the tests of gathered weights run; apart, because a rank can import this file by its name only."""

import resource
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.config.rollout import RolloutServerConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.tensors import policy_tensors
from nemo_mapo.rollout.client import ServerRollout
from nemo_mapo.rollout.client_http import RolloutUnavailable
from nemo_mapo.rollout.protocol import RolloutBackend
from nemo_mapo.testing.layouts import Layout, build
from nemo_mapo.testing.tiny import SAMPLE_RATE, TinyAudioLLM, tiny_model_config, tiny_prompt_batch, tiny_tokenizer
from nemo_mapo.training.checkpoint import load_checkpoint
from nemo_mapo.types import Rollouts

LARGEST_FILE = 10_000
"""Bytes; the tiny model's embedding fits, the first of its feed-forward matrices does not."""
SAMPLING = SamplingConfig(max_new_tokens=8)
GROUP = 2


@dataclass(frozen=True)
class Gathered:
    """What a rank got."""

    tensors: dict[str, Tensor]
    kept: int
    """Most tensors that were made for the caller and still there when it had let go of them and asked for the next."""
    shared: int
    """Tensors that lie in the model's own memory."""


def loaded(layout: Layout, base: ModelConfig, start: str) -> AudioLLM:
    model = build(layout.config(base), seed=99, dtype=layout.dtype)
    load_checkpoint(Path(start), model)
    return model


def uncut_state(layout: Layout, base: ModelConfig, start: str) -> dict[str, Tensor]:
    """In one process: all tensors of the model's state."""
    state = loaded(layout, base, start).state_dict()
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def gathered(layout: Layout, base: ModelConfig, start: str) -> Gathered:
    """On every rank: load in this layout, and gather."""
    model = loaded(layout, base, start)
    memory = {value.untyped_storage().data_ptr() for value in model.state_dict().values() if isinstance(value, Tensor)}
    tensors: dict[str, Tensor] = {}
    made: list[weakref.ref[Tensor]] = []
    kept = shared = 0
    for name, tensor in policy_tensors(model):
        assert name not in tensors and not tensor.requires_grad
        kept = max(kept, sum(one() is not None for one in made))
        tensors[name] = tensor.clone()
        if tensor.untyped_storage().data_ptr() in memory:
            shared += 1
        else:
            made.append(weakref.ref(tensor))
        del tensor
    return Gathered(tensors=tensors, kept=kept, shared=shared)


def sampled_after_a_failed_update(
    layout: Layout, base: ModelConfig, start: str, url: str, sync_dir: str
) -> tuple[str, Rollouts]:
    """On every rank: what an update that the first rank has to break off raises; then samples of one that succeeds."""
    model = loaded(layout, base, start)
    config = RolloutServerConfig(urls=(url,), sync_dir=sync_dir, bucket_megabytes=0.001, max_attempts=2)
    client = ServerRollout(config, tiny_tokenizer(), sample_rate=SAMPLE_RATE, token=None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, before[1]))
    message = ""
    try:
        client.update_weights(1, policy_tensors(model))
    except RolloutUnavailable as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    client.update_weights(2, policy_tensors(model))
    return message, samples(client, model)


def samples(engine: RolloutBackend, model: AudioLLM) -> Rollouts:
    """What an engine samples for some prompts of the tiny model."""
    prompts = tiny_prompt_batch(TinyAudioLLM(config=tiny_model_config(), model=model, tokenizer=tiny_tokenizer()))
    return engine.generate(prompts, SAMPLING, group_size=GROUP, seeds=torch.arange(GROUP * len(prompts)))
