"""Megatron-core 0.12 and 0.19: what was renamed or moved between them, under one name.

| | 0.12 | 0.19 |
|---|---|---|
| sending between pipeline stages | functions | methods of `P2PCommunicator` |
| what a checkpoint holds besides tensors | `common.pt` | an object among the tensors |
| MLP in a layer's spec | `ModuleSpec` | a partial of its class |
| logits of a forward pass with a KV cache | by default of the last position | of all positions |
"""

from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.pipeline_parallel import p2p_communication
from torch import Tensor

from nemo_mapo.processes import is_main_rank

_COMMON: Final = "common.pt"
_SENDS_BY_OBJECT: Final = "P2PCommunicator" in vars(p2p_communication)


def mlp_submodules(layer: Any) -> Any:
    """Submodules of the dense MLP in a layer's spec; the model is built from them, with any changes made to them."""
    mlp = layer.submodules.mlp
    return mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]


def receive_from_previous_stage(config: Any) -> Tensor:
    """Receive hidden states from the previous pipeline stage; never called on the first one."""
    # The shape is exchanged first (variable_seq_lengths), so the one given here does not matter.
    if _SENDS_BY_OBJECT:
        received: Tensor = _communicator(config).recv_forward((), is_first_stage=False)
    else:
        received = p2p_communication.recv_forward((), config)
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
