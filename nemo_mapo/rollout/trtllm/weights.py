"""The policy's decoder under the names of Megatron-core's export, and under those of a built engine."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Final

import torch
from megatron.core.export.trtllm.model_to_trllm_mapping.default_conversion_dict import DEFAULT_CONVERSION_DICT
from megatron.core.export.trtllm.trtllm_layers import TRTLLMLayers
from torch import Tensor

from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.lora import merged_state_dict

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_FUSED = "fused_fc.weight"
_NOT_IN_A_LLAMA: Final = frozenset(
    {TRTLLMLayers.attention_qkv_bias, TRTLLMLayers.mlp_router_weight}
    | {layer for layer in TRTLLMLayers if layer.value.endswith(".expert")}
)
"""Megatron-core has names for these, but TensorRT-LLM's llama, the only decoder of ours that it can export, has no
place for them and would run without."""


def exported_weights(policy: AudioLLM) -> dict[str, Tensor]:
    """This rank's part of the decoder by name, detached; perception stays outside the engine.

    A tied head is given as a tensor of its own, and adapters are merged into their weights, which are then new
    tensors; nothing else is copied.

    Raises:
        ValueError: the decoder has a tensor that TensorRT-LLM's llama has no place for.
    """
    with torch.no_grad():
        state = merged_state_dict(policy.language_model)
    # Linears keep extra states beside their tensors.
    weights = {name: value for name, value in state.items() if isinstance(value, Tensor) and "_extra_state" not in name}
    for name in weights:
        layer = DEFAULT_CONVERSION_DICT.get(TRTLLMLayers.return_layer_name_and_number(name)[0])
        if layer is None or layer in _NOT_IN_A_LLAMA:
            raise ValueError(
                f"rollout.backend=trtllm: TensorRT-LLM's llama has no place for {name} of the decoder; "
                "use rollout.backend=megatron or vllm"
            )
    weights.setdefault(_HEAD, weights[_EMBEDDING])
    return weights


def placed_weights(converted: Mapping[str, Tensor], engine_names: AbstractSet[str]) -> dict[str, Tensor]:
    """Converted weights under the names that a built engine has for them, every one of them placed.

    TensorRT-LLM's builder may have fused a layer's `mlp.gate` and `mlp.fc` (in that order), and have tied a head to an
    embedding of equal values.

    Args:
        converted: by TensorRT-LLM's names, as Megatron-core's converter gives them.
        engine_names: the weights that the engine can be given.

    Raises:
        ValueError: the engine has no place for a weight, or a weight of its own that would keep its old values; names
            it.
    """
    placed = dict(converted)
    for name in engine_names:
        if name.endswith(_FUSED) and name not in placed:
            mlp = name.removesuffix(_FUSED)
            placed[name] = torch.cat([placed.pop(f"{mlp}gate.weight"), placed.pop(f"{mlp}fc.weight")])
    embedding, head = TRTLLMLayers.vocab_embedding.value, TRTLLMLayers.lm_head.value
    for one, other in ((embedding, head), (head, embedding)):
        if one not in engine_names and other in engine_names and torch.equal(placed[one], placed[other]):
            del placed[one]
    if nowhere := sorted(placed.keys() - engine_names):
        raise ValueError(f"the TensorRT-LLM engine has no weight {nowhere[0]} ({len(nowhere)} such)")
    # Its other constants, such as rotary tables, do not come from the policy.
    if old := sorted(name for name in engine_names - placed.keys() if name.endswith((".weight", ".bias"))):
        raise ValueError(f"the TensorRT-LLM engine would keep its old {old[0]} ({len(old)} such)")
    return placed
