"""What the ranks of the tests of gathered weights run; apart, because a rank can import this file by its name only."""

import weakref
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.tensors import policy_tensors
from nemo_mapo.rollout.vllm.weights import served_weights
from nemo_mapo.training.checkpoint import load_checkpoint
from support.layouts import Layout, build


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


def unsharded_state(layout: Layout, base: ModelConfig, start: str) -> dict[str, Tensor]:
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


def served(layout: Layout, base: ModelConfig, start: str) -> dict[str, Tensor]:
    """On every rank: what vLLM would be sent."""
    model = loaded(layout, base, start)
    config = layout.config(base)
    return {name: tensor.clone() for name, tensor in served_weights(policy_tensors(model), config, prefix="")}
