"""Megatron-core GPTModel with our core attention in its layer spec."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_mapo.attention.core import SDPACoreAttention
from nemo_mapo.attention.session import AttentionSession
from nemo_mapo.attention.te_support import Layout
from nemo_mapo.config.model import DecoderConfig, ModelConfig
from nemo_mapo.models.linears import ColumnLinear, RowLinear
from nemo_mapo.models.te_spec import te_layer_specs, te_settings
from nemo_mapo.upstream.megatron import mlp_submodules


class RMSNorm(nn.Module):
    """RMS layer norm with Megatron's constructor signature (its own torch wrapper refuses sequence parallelism)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class RotatedCacheSelfAttention(SelfAttention):  # type: ignore[misc]
    """Megatron's self-attention, except that keys are rotated once, as they enter the KV cache.

    Upstream caches unrotated keys and rotates the whole cache at every decoding step. On target layers the core
    attention is never recomputed: run again in the backward pass, the mass would have no gradient. Fused attention
    keeps no weights, so nothing is lost.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if self.core_attention.layer in self.core_attention.session.target_layers:
            self.checkpoint_core_attention = False

    def _adjust_key_value_for_inference(
        self,
        inference_context: StaticInferenceContext | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: tuple[Tensor, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        adjust = super()._adjust_key_value_for_inference
        if inference_context is None:
            return adjust(inference_context, query, key, value, rotary_pos_emb, *args, **kwargs)
        start = inference_context.sequence_len_offset
        heads = (query.shape[2], key.shape[2])
        # Queries and keys turn alike: one rotation of all heads, and none is left for Megatron.
        rotated = apply_rotary_pos_emb(
            torch.cat((query, key), dim=2), rotary_pos_emb[1][start : start + len(key)], config=self.config
        )
        query, key = rotated.split_with_sizes(heads, dim=2)
        return adjust(inference_context, query, key, value, None, *args, **kwargs)


def transformer_config(model: ModelConfig, params_dtype: torch.dtype) -> TransformerConfig:
    """Megatron's config: pre-norm RMSNorm, SwiGLU, biases on q, k, v at most, no dropout, no fused CUDA kernels."""
    config = model.decoder
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        ffn_hidden_size=config.ffn_hidden_size,
        layernorm_epsilon=config.layernorm_epsilon,
        init_method_std=config.init_method_std,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=config.add_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        pipeline_dtype=params_dtype,
        use_cpu_initialization=True,
        perform_initialization=True,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        sequence_parallel=model.sequence_parallel,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        expert_model_parallel_size=model.expert_model_parallel_size,
        variable_seq_lengths=True,
        # Checked for dense decoders too: the other dispatcher needs rows of equal length.
        moe_token_dispatcher_type="alltoall",
        **(te_settings(model.precision) if model.attention_backend == "transformer_engine" else {}),
        **_expert_settings(config),
        **_recompute_settings(model),
    )


def _expert_settings(config: DecoderConfig) -> dict[str, Any]:
    """Softmax over the chosen experts (normalised weights), no token dropped, one linear pair per expert."""
    if config.num_moe_experts is None:
        return {}
    balanced = config.moe_aux_loss_coeff > 0
    return {
        "num_moe_experts": config.num_moe_experts,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_router_topk": config.moe_router_topk,
        "moe_router_load_balancing_type": "aux_loss" if balanced else "none",
        "moe_aux_loss_coeff": config.moe_aux_loss_coeff,
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": False,
    }


def _recompute_settings(model: ModelConfig) -> dict[str, Any]:
    """Full recompute stops below the first target layer, whose mass must stay in the autograd graph."""
    config = model.decoder
    if config.recompute_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(config.recompute_modules)}
    if config.recompute_granularity is None:
        return {}
    count = model.recomputed_layers_per_stage[parallel_state.get_pipeline_model_parallel_rank()]
    if count == 0:
        return {}
    return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": count}


def decoder_layer_specs(config: TransformerConfig, session: AttentionSession) -> TransformerBlockSubmodules:
    """Megatron's local layer spec with RMSNorm and the core attention that can report its audio mass."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.module = RotatedCacheSelfAttention
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(module=SDPACoreAttention, params={"session": session})
    attention.linear_qkv, attention.linear_proj = ColumnLinear, RowLinear
    if config.num_moe_experts is None:
        dense = mlp_submodules(layer)
        dense.linear_fc1, dense.linear_fc2 = ColumnLinear, RowLinear
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config),
        layer_norm=RMSNorm,
    )


def build_decoder(
    model: ModelConfig, *, vocab_size: int, session: AttentionSession, params_dtype: torch.dtype
) -> GPTModel:
    """Build this rank's part of the decoder; `vocab_size` must be a multiple of the tensor-parallel size."""
    megatron_config = transformer_config(model, params_dtype)
    config = model.decoder
    if model.attention_backend == "transformer_engine":
        layout: Layout = "sbhd" if model.packed_tokens is None else "thd"
        specs = te_layer_specs(megatron_config, session, layout=layout, self_attention=RotatedCacheSelfAttention)
    else:
        specs = decoder_layer_specs(megatron_config, session)
    decoder = GPTModel(
        megatron_config,
        specs,
        vocab_size=vocab_size,
        max_sequence_length=config.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=config.rotary_base,
        rope_scaling=config.rope_scaling == "llama3",
        rope_scaling_factor=config.rope_scaling_factor,
        seq_len_interpolation_factor=config.rope_scaling_factor if config.rope_scaling == "linear" else None,
        share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        # Audio goes into whole sequences; they are sharded over the tensor-parallel ranks afterwards.
        scatter_embedding_sequence_parallel=False,
    )
    decoder.rotary_pos_emb.register_forward_hook(_AtPositions(session))
    if decoder.post_process:
        decoder.output_layer.register_forward_pre_hook(_WantedLogits(session))
    return decoder


class _AtPositions:
    """Hook: rotations for the positions of the forward in progress, which Megatron assumes to be 0, 1, 2, ..."""

    def __init__(self, session: AttentionSession) -> None:
        self.session = session

    def __call__(self, module: nn.Module, args: Any, rotations: Tensor) -> Tensor:
        return self.session.placed(rotations)


class _WantedLogits:
    """Hook: the output layer sees only the tokens whose logits the forward in progress needs."""

    def __init__(self, session: AttentionSession) -> None:
        self.session = session

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.session.read(args[0]), *args[1:])
