"""Megatron core attention on torch's scaled-dot-product attention, with audio mass on target layers."""

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_mapo.attention.mass import Blocked, attention_with_audio_mass, attention_without_mass
from nemo_mapo.attention.session import AttentionSession
from nemo_mapo.attention.shared import shared_prompt_attention
from nemo_mapo.upstream.megatron import layer_index

SHARED_PROMPT_AXES = 3
"""Axes of an attention mask that holds positions; segment ids have two."""


class SDPACoreAttention(torch.nn.Module):
    """Causal self-attention for Megatron's layer spec that reports the audio mass of target layers to the session.

    Put it in a spec as `ModuleSpec(module=SDPACoreAttention, params={"session": session})`. With a KV cache the
    queries are the last key positions, even if Megatron requests no mask after the prompt.

    ValueError at construction for what it does not support: attention dropout, masks other than causal, cross
    attention, sliding windows, context parallelism.
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
        pg_collection: Any = None,
        *,
        session: AttentionSession,
    ) -> None:
        """Take Megatron's arguments and the model's `session`."""
        super().__init__()
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        _refuse_unsupported(config, attn_mask_type, attention_type, dropout)
        self.session = session
        self.layer = layer_index(config, layer_number)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Float[Tensor, "time_q *batch heads dim"],
        key: Float[Tensor, "time_k *batch kv_heads dim"],
        value: Float[Tensor, "time_k *batch kv_heads dim_v"],
        attention_mask: Int[Tensor, "batch cache"] | Int[Tensor, "1 1 time_k"] | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Float[Tensor, "time_q *batch hidden"]:
        """Attend, and report the audio mass to the session if it asks for it.

        `attention_mask` holds segment ids of at least time_k keys, 0 on padding; or, with a third axis, the positions
        of a single row whose completions share their prompts (`shared_prompts`); None if causality alone is enough.
        Both are passed here and not through the session, because Megatron passes its mask to layers that it recomputes
        in the backward pass. With `packed_seq_params` (THD) the row holds whole sequences one after the other, and
        there is no batch axis.
        `attn_mask_type` is ignored: causality over the cache covers causal and no_mask. ValueError for an attention
        bias, or for segment ids together with `packed_seq_params`.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias must be None")
        if packed_seq_params is not None:
            if attention_mask is not None:
                raise ValueError("packed rows have their boundaries in packed_seq_params; attention_mask must be None")
            return self._attend_packed(query, key, value, packed_seq_params)
        if attention_mask is not None and attention_mask.dim() == SHARED_PROMPT_AXES:
            return self._attend_shared(query, key, value, attention_mask.flatten())
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        segment_ids = None if attention_mask is None else _first_keys(attention_mask, key.shape[1])
        audio = self.session.audio_keys(key.shape[1]) if self.session.captures(self.layer) else None
        blocked = self.session.blocked(self.layer, key.shape[1])
        output, mass = self._attend(query, key, value, audio, segment_ids, blocked)
        if mass is not None:
            self.session.record(self.layer, mass)
        return output.transpose(0, 1).flatten(start_dim=2)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        audio: Tensor | None,
        segment_ids: Tensor | None,
        blocked: Blocked | None,
    ) -> tuple[Tensor, Tensor | None]:
        masks: dict[str, Any] = {
            "segment_ids": segment_ids,
            "softmax_scale": self.softmax_scale,
            "blocked": blocked,
        }
        if audio is None:
            return attention_without_mass(query, key, value, **masks), None
        return attention_with_audio_mass(query, key, value, audio, **masks)

    def _attend_shared(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor
    ) -> Float[Tensor, "time 1 hidden"]:
        """Attend over one row of groups, each of which reads its prompt once."""
        audio = self.session.audio_keys(len(key))[0] if self.session.captures(self.layer) else None
        output, mass = shared_prompt_attention(
            query[:, 0],
            key[:, 0],
            value[:, 0],
            positions,
            audio_key_mask=audio,
            softmax_scale=self.softmax_scale,
            blocked=self.session.blocked(self.layer, len(key)),
        )
        if mass is not None:
            self.session.record(self.layer, mass[None])
        return output.flatten(start_dim=1)[:, None]

    def _attend_packed(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams
    ) -> Float[Tensor, "time hidden"]:
        """Attend sequence by sequence: the cost is the sum of squared lengths, not the square of the row length."""
        audio = self.session.audio_keys(key.shape[0]) if self.session.captures(self.layer) else None
        blocked = self.session.blocked(self.layer, key.shape[0])
        bounds = packed.cu_seqlens_q.tolist()
        assert bounds[0] == 0 and bounds[-1] == query.shape[0], "cu_seqlens must cover the whole packed row"
        outputs, masses = [], []
        for start, end in pairwise(bounds):
            query_part, key_part, value_part = (tensor[None, start:end] for tensor in (query, key, value))
            audio_part = None if audio is None else audio[:, start:end]
            own = slice(start, end)
            blocked_part = None if blocked is None else blocked.part(slice(None), own, own)
            output, mass = self._attend(query_part, key_part, value_part, audio_part, None, blocked_part)
            outputs.append(output[0])
            masses.append(mass)
        if audio is not None:
            self.session.record(self.layer, torch.cat([mass for mass in masses if mass is not None], dim=2))
        return torch.cat(outputs).flatten(start_dim=1)


def _first_keys(segment_ids: Tensor, time_k: int) -> Tensor:
    if segment_ids.shape[1] < time_k:
        raise ValueError(f"segment_ids cover {segment_ids.shape[1]} positions, attention has {time_k} keys")
    return segment_ids[:, :time_k]


def _refuse_unsupported(
    config: TransformerConfig, attn_mask_type: AttnMaskType, attention_type: str, dropout: float
) -> None:
    if dropout != 0:
        raise ValueError(f"attention_dropout={dropout} is not supported; set it to 0")
    if attn_mask_type != AttnMaskType.causal or attention_type != "self":
        raise ValueError(f"only causal self-attention is supported, not {attn_mask_type} {attention_type}-attention")
    if config.window_size is not None:
        raise ValueError(f"window_size={config.window_size} is not supported; set it to None")
    if config.context_parallel_size != 1:
        raise ValueError(
            f"context_parallel_size={config.context_parallel_size} is not supported by the audio mass; set it to 1"
        )
