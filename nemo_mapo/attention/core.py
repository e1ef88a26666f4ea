"""Megatron core attention on torch's scaled-dot-product attention, with audio mass on target layers."""

import torch
from jaxtyping import Float
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_mapo.attention.mass import attention_with_audio_mass, attention_without_mass
from nemo_mapo.attention.session import AttentionSession


class SDPACoreAttention(torch.nn.Module):
    """Causal self-attention for Megatron's layer spec; what is visible comes from the session, not from Megatron.

    Put it in a spec as `ModuleSpec(module=SDPACoreAttention, params={"session": session})`. With a KV cache the
    queries are the last positions of the keys, also where Megatron asks for no mask after the prompt.

    ValueError at construction for what it cannot do rightly: attention dropout, masks other than causal, cross
    attention, sliding windows, activation recompute, tensor, pipeline or context parallelism.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        *,
        session: AttentionSession,
    ) -> None:
        """Take Megatron's constructor arguments (`layer_number` counts from 1) and the model's `session`."""
        super().__init__()
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        _refuse_unsupported(config, attn_mask_type, attention_type, dropout)
        self.session = session
        self.layer = layer_number - 1
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Float[Tensor, "time_q batch heads dim"],
        key: Float[Tensor, "time_k batch kv_heads dim"],
        value: Float[Tensor, "time_k batch kv_heads dim_v"],
        attention_mask: None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Float[Tensor, "time_q batch hidden"]:
        """Attend, and report the audio mass to the session where it asks for it.

        `attn_mask_type` carries nothing new: Megatron sends causal in the prompt and no_mask behind it, and causality
        over the cache covers both. ValueError for an attention mask, bias or packing description, RuntimeError when the
        session has no active forward.
        """
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            raise ValueError(
                "attention_mask, attention_bias and packed_seq_params must be None: "
                "hand segment_ids to AttentionSession.forward(...) instead"
            )
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        inputs = self.session.inputs.up_to(key.shape[1])
        if self.session.captures(self.layer):
            assert inputs.audio_key_mask is not None, "a session captures only with an audio key mask"
            output, mass = attention_with_audio_mass(
                query,
                key,
                value,
                inputs.audio_key_mask,
                segment_ids=inputs.segment_ids,
                softmax_scale=self.softmax_scale,
            )
            self.session.record(self.layer, mass)
        else:
            output = attention_without_mass(
                query, key, value, segment_ids=inputs.segment_ids, softmax_scale=self.softmax_scale
            )
        return output.transpose(0, 1).flatten(start_dim=2)


def _refuse_unsupported(
    config: TransformerConfig, attn_mask_type: AttnMaskType, attention_type: str, dropout: float
) -> None:
    if dropout != 0:
        raise ValueError(f"attention_dropout={dropout} is not supported; set it to 0")
    if attn_mask_type != AttnMaskType.causal or attention_type != "self":
        raise ValueError(f"only causal self-attention is supported, not {attn_mask_type} {attention_type}-attention")
    if config.window_size is not None:
        raise ValueError(f"window_size={config.window_size} is not supported; set it to None")
    if config.recompute_granularity is not None:
        raise ValueError(
            f"recompute_granularity={config.recompute_granularity} is not supported: "
            "the audio mass would carry no gradient; set it to None"
        )
    for name in ("tensor_model", "pipeline_model", "context"):
        if (size := getattr(config, f"{name}_parallel_size")) != 1:
            raise ValueError(f"{name}_parallel_size={size} is not supported by the audio mass yet; set it to 1")
