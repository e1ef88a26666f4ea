"""Megatron core attention on Transformer Engine, with audio mass on target layers from a second, narrow call."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_mapo.attention.core import SDPACoreAttention
from nemo_mapo.attention.session import AttentionSession
from nemo_mapo.attention.te_support import (
    MASS_WIDTH,
    AttentionCase,
    Dtype,
    Layout,
    Machine,
    mass_call_case,
    refuse_illegal,
)
from nemo_mapo.upstream.megatron import layer_index

_DTYPES: dict[torch.dtype, Dtype] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, kw_only=True)
class TransformerEngine:
    """What the installed Transformer Engine and this machine offer."""

    machine: Machine
    attention: Callable[..., nn.Module]
    """Megatron's TEDotProductAttention, or anything with its constructor and forward."""
    without_fp8: Callable[[], AbstractContextManager[Any]]
    """A context in which Transformer Engine computes nothing in FP8."""


def transformer_engine() -> TransformerEngine:
    """Look up Transformer Engine; ValueError if it or a CUDA device is missing."""
    try:
        import transformer_engine.pytorch as te
        from transformer_engine.pytorch.utils import get_cudnn_version
    except ImportError as missing:
        raise ValueError(
            "the Transformer Engine backend needs the package transformer_engine with its PyTorch part, which cannot "
            f"be imported ({missing}); use a container that has it, or the SDPA backend"
        ) from missing
    if not torch.cuda.is_available():
        raise ValueError("the Transformer Engine backend needs a CUDA device; use the SDPA backend")
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.utils import get_te_version

    deterministic = os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1") == "0"
    machine = Machine(
        chip=torch.cuda.get_device_capability(),
        cudnn=get_cudnn_version(),
        te=get_te_version().release[:2],
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
    )
    return TransformerEngine(
        machine=machine, attention=TEDotProductAttention, without_fp8=lambda: te.fp8_autocast(enabled=False)
    )


class TECoreAttention(nn.Module):
    """Causal self-attention for Megatron's layer spec that reports the audio mass of target layers to the session.

    Transformer Engine returns no weights, so the mass is the output of a second call with the same queries and keys,
    whose values are MASS_WIDTH wide and hold the audio indicator in their first channel. It never runs in FP8.

    Rows are packed if built with layout="thd", otherwise unpacked and without padding before the last real token.
    ValueError at construction for what `te_support` refuses, for attention dropout, masks other than causal, cross
    attention and context parallelism, and if Transformer Engine is missing.
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
        layout: Layout = "sbhd",
        engine: TransformerEngine | None = None,
    ) -> None:
        """Take Megatron's arguments, the model's `session` and `layout`; `engine` is looked up if it is None."""
        super().__init__()
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        # It refuses what neither backend can do.
        self.generation = SDPACoreAttention(
            config, layer_number, attn_mask_type, attention_type, dropout, softmax_scale, session=session
        )
        engine = engine or transformer_engine()
        refuse_illegal(attention_cases(config, engine.machine, layout))
        self.session = session
        self.layout = layout
        self._without_fp8 = engine.without_fp8
        self.layer = layer_index(config, layer_number)
        arguments: dict[str, Any] = {
            "config": config,
            "layer_number": layer_number,
            "attn_mask_type": attn_mask_type,
            "attention_type": attention_type,
            "attention_dropout": dropout,
            "softmax_scale": softmax_scale,
        }
        self.output_call = engine.attention(**arguments)
        self.mass_call: nn.Module | None = None
        if self.layer in session.target_layers:
            self.mass_call = engine.attention(**arguments, k_channels=config.kv_channels, v_channels=MASS_WIDTH)

    def forward(
        self,
        query: Float[Tensor, "time_q *batch heads dim"],
        key: Float[Tensor, "time_k *batch kv_heads dim"],
        value: Float[Tensor, "time_k *batch kv_heads dim"],
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Float[Tensor, "time_q *batch hidden"]:
        """Attend, and report the audio mass to the session if it asks for it.

        With `packed_seq_params` (THD) the row holds whole sequences one after the other, and there is no batch axis.
        `attn_mask_type` is ignored: all rows are causal. In generation (segment ids of left-padded prompts in
        `attention_mask`, or a key cache) torch's attention runs instead. ValueError for generation with gradient, for
        an attention bias, and for packed rows if the module was built for unpacked ones.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias must be None")
        if attention_mask is not None or query.shape[0] != key.shape[0]:
            return self._generate(query, key, value, attention_mask)
        if packed_seq_params is not None and self.layout != "thd":
            raise ValueError("attention was built for unpacked rows and got packed ones; build it with layout='thd'")
        if self.session.blocked(self.layer, key.shape[0]) is not None:
            raise ValueError(
                "deaf tokens need a mask per query, which Transformer Engine does not take; build the model with "
                "model.attention_backend=sdpa to measure what listening is worth"
            )
        rows = {
            "attention_mask": None,
            "attn_mask_type": AttnMaskType.causal,
            "packed_seq_params": packed_seq_params,
        }
        output: Tensor = self.output_call(query, key, value, **rows)
        if self.session.captures(self.layer):
            self.session.record(self.layer, self._audio_mass(query, key, rows))
        return output

    def _generate(self, query: Tensor, key: Tensor, value: Tensor, segment_ids: Tensor | None) -> Tensor:
        """Torch's attention for rollouts, which pad on the left and keep a key cache, and so need masks."""
        if torch.is_grad_enabled():
            raise ValueError("segment ids and key caches are for generation; pack rows to train on Transformer Engine")
        output: Tensor = self.generation(query, key, value, segment_ids)
        return output

    def _audio_mass(self, query: Tensor, key: Tensor, rows: dict[str, Any]) -> Float[Tensor, "batch heads time"]:
        assert self.mass_call is not None, "the session's target layers changed after the model was built"
        indicator = audio_indicator(key, self.session.audio_keys(key.shape[0]))
        with self._without_fp8():
            channels = self.mass_call(query, key, indicator, **rows)
        return mass_of_channels(channels, heads=query.shape[-2])


def attention_cases(config: TransformerConfig, machine: Machine, layout: Layout) -> dict[str, AttentionCase]:
    """The two attention calls that a model with `config` makes in training on `machine`."""
    output = AttentionCase(
        machine=machine,
        head_dim_qk=config.kv_channels,
        head_dim_v=config.kv_channels,
        dtype="fp8" if config.fp8 and config.fp8_dot_product_attention else _DTYPES[config.params_dtype],
        layout=layout,
        window=_window(config),
    )
    return {"output": output, "audio mass": mass_call_case(output)}


def _window(config: TransformerConfig) -> int | None:
    """Megatron writes -1 for no limit to the left."""
    if config.window_size is None or config.window_size[0] < 0:
        return None
    left: int = config.window_size[0]
    return left


def audio_indicator(
    key: Float[Tensor, "time *batch kv_heads dim"], audio_keys: Bool[Tensor, "rows time"]
) -> Float[Tensor, "time *batch kv_heads width"]:
    """Values for the mass call: 1 in the first of MASS_WIDTH channels on audio keys, 0 elsewhere.

    A packed row has no batch axis in `key` and one row in `audio_keys`.
    """
    on_audio = audio_keys.transpose(0, 1).reshape(key.shape[:-2])
    indicator = key.new_zeros(*key.shape[:-1], MASS_WIDTH)
    indicator[..., 0] = on_audio.unsqueeze(-1)
    return indicator


def mass_of_channels(channels: Float[Tensor, "time *batch hidden"], heads: int) -> Float[Tensor, "rows heads time"]:
    """The audio mass, float32, from the output of the mass call; a packed row becomes one row."""
    mass = channels.view(*channels.shape[:-1], heads, MASS_WIDTH)[..., 0].float()
    return mass.reshape(mass.shape[0], -1, heads).permute(1, 2, 0)
