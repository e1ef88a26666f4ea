"""Megatron-core 0.12 and 0.19: what was renamed or moved between them, under one name.

| | 0.12 | 0.19 |
|---|---|---|
| sending between pipeline stages | functions | methods of `P2PCommunicator` |
| what a checkpoint holds besides tensors | `common.pt` | an object among the tensors |
| MLP in a layer's spec | `ModuleSpec` | a partial of its class |
| logits of a forward pass with a KV cache | of the last position, unless told | of all positions |
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
    """Submodules of the dense MLP in a layer's spec; what is set on them is built."""
    mlp = layer.submodules.mlp
    return mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]


def receive_from_previous_stage(config: Any) -> Tensor:
    """Hidden states of the pipeline stage before; not for the first stage."""
    # The shape is exchanged first (variable_seq_lengths), so what is said here does not matter.
    if _SENDS_BY_OBJECT:
        received: Tensor = _communicator(config).recv_forward((), is_first_stage=False)
    else:
        received = p2p_communication.recv_forward((), config)
    return received


def send_to_next_stage(hidden: Tensor, config: Any) -> None:
    """Hand hidden states on; not for the last stage."""
    if _SENDS_BY_OBJECT:
        _communicator(config).send_forward(hidden, is_last_stage=False)
    else:
        p2p_communication.send_forward(hidden, config)


def _communicator(config: Any) -> Any:
    return p2p_communication.P2PCommunicator(parallel_state.get_pipeline_model_parallel_group(), config)


def save(state: dict[str, Any], directory: Path, *, strategy: Any = None) -> None:
    """Write a sharded state as `dist_checkpointing.save`, such that each of these releases reads it.

    On all ranks together.
    """
    dist_checkpointing.save(state, str(directory), sharded_strategy=strategy)
    if is_main_rank() and not (common := directory / _COMMON).exists():
        torch.save(dist_checkpointing.load_common_state_dict(str(directory)), common)
    dist.barrier()


def key_value_cache(rows: int, positions: int) -> StaticInferenceContext:
    """Megatron's static KV cache; a forward pass gives the logits that it is asked for."""
    cache = StaticInferenceContext(rows, positions)
    cache.materialize_only_last_token_logits = False
    return cache
