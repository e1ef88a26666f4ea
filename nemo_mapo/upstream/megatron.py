"""Megatron-core 0.12 and 0.19: what was renamed or moved between them, under one name.

| | 0.12 | 0.19 |
|---|---|---|
| sending between pipeline stages | functions | methods of `P2PCommunicator` |
| what a checkpoint holds besides tensors | `common.pt` | an object among the tensors |
| MLP in a layer's spec | `ModuleSpec` | a partial of its class |
| logits of a forward pass with a KV cache | by default of the last position | of all positions |
| SwiGLU | as in the paper | adds an offset, 0 by default, and keeps the sum for the backward pass |
| layer number that an attention core gets | on its pipeline stage | in the whole model |
"""

from pathlib import Path
from typing import Any, Final

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from packaging.version import Version
from torch import Tensor

from nemo_mapo.processes import is_main_rank

_COMMON: Final = "common.pt"
_SENDS_BY_OBJECT: Final = "P2PCommunicator" in vars(p2p_communication)
SWIGLU_KEEPS: Final = 4 if hasattr(TransformerConfig, "glu_linear_offset") else 3
"""Tensors of the inner width that the feed-forward keeps for the backward pass."""
_NUMBERS_BY_STAGE: Final = Version(megatron.core.__version__).release < (0, 13)


def mlp_submodules(layer: Any) -> Any:
    """Submodules of the dense MLP in a layer's spec; the model is built from them, with any changes made to them."""
    mlp = layer.submodules.mlp
    return mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]


def layer_index(config: TransformerConfig, layer_number: int) -> int:
    """Index in the whole model, from 0, of the layer whose attention core is built with this number.

    layer_index(config, 1)  # 0 on the only stage, or the first
    """
    if _NUMBERS_BY_STAGE and config.pipeline_model_parallel_size > 1:
        layer_number += get_transformer_layer_offset(config)
    return layer_number - 1


def receive_from_previous_stage(config: Any) -> Tensor:
    """Receive hidden states from the previous pipeline stage; never called on the first one."""
    # The shape is exchanged first (variable_seq_lengths), so the one given here does not matter.
    if _SENDS_BY_OBJECT:
        received: Tensor = _communicator(config).recv_forward((1,), is_first_stage=False)
    else:
        received = p2p_communication.recv_forward((1,), config)
    return received


def send_to_next_stage(hidden: Tensor, config: Any) -> None:
    """Send hidden states to the next pipeline stage; never called on the last one."""
    if _SENDS_BY_OBJECT:
        _communicator(config).send_forward(hidden, is_last_stage=False)
    else:
        p2p_communication.send_forward(hidden, config)


def _communicator(config: Any) -> Any:
    return p2p_communication.P2PCommunicator(parallel_state.get_pipeline_model_parallel_group(), config)


def save(state: dict[str, Any], directory: Path, *, strategy: Any = None) -> None:
    """Write a sharded state with `dist_checkpointing.save` so that either release reads it; all ranks call it."""
    dist_checkpointing.save(state, str(directory), sharded_strategy=strategy)
    if is_main_rank() and not (common := directory / _COMMON).exists():
        torch.save(dist_checkpointing.load_common_state_dict(str(directory)), common)
    dist.barrier()


def key_value_cache(rows: int, positions: int) -> StaticInferenceContext:
    """Megatron's static KV cache, set so that a forward pass returns all the logits that it is asked for."""
    cache = StaticInferenceContext(rows, positions)
    cache.materialize_only_last_token_logits = False
    return cache
