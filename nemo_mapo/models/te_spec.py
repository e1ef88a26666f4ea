"""Megatron's layer spec with Transformer Engine linears, norms and attention."""

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_mapo.attention.session import AttentionSession
from nemo_mapo.attention.te_core import TECoreAttention, transformer_engine
from nemo_mapo.attention.te_support import Layout, fp8_recipe_refusals
from nemo_mapo.config.precision import PrecisionConfig


def te_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Arguments of Megatron's TransformerConfig for this backend: fused attention or an error, and FP8."""
    return {"attention_backend": AttnBackend.fused, **precision.megatron_settings()}


def te_layer_specs(
    config: TransformerConfig,
    session: AttentionSession,
    *,
    layout: Layout,
    self_attention: type[SelfAttention] = SelfAttention,
) -> TransformerBlockSubmodules:
    """Megatron's Transformer Engine layers with `self_attention` around the core attention that can report its mass.

    ValueError if Transformer Engine or a CUDA device is missing, or this machine cannot run `config` as it is.
    """
    engine = transformer_engine()
    reasons = fp8_recipe_refusals(config.fp8_recipe, engine.machine) if config.fp8 else []
    if reasons:
        raise ValueError(f"fp8={config.fp8} cannot run on this machine: " + "; ".join(reasons))
    from megatron.core.extensions.transformer_engine import TENorm

    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
    )
    attention = layer.submodules.self_attention
    attention.module = self_attention
    attention.submodules.core_attention = ModuleSpec(
        module=TECoreAttention, params={"session": session, "layout": layout, "engine": engine}
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=TENorm)
