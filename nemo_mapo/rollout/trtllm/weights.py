"""The policy's decoder under the names that Megatron-core's export to TensorRT-LLM takes."""

from typing import Final

import torch
from megatron.core.export.trtllm.model_to_trllm_mapping.default_conversion_dict import DEFAULT_CONVERSION_DICT
from megatron.core.export.trtllm.trtllm_layers import TRTLLMLayers
from torch import Tensor

from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.lora import merged_state_dict

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
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
                "use rollout.backend=megatron or server"
            )
    weights.setdefault(_HEAD, weights[_EMBEDDING])
    return weights
