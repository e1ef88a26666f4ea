"""Names and layouts of the exported decoder, against Megatron-core's converter and a llama of transformers."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from megatron.core.export.data_type import DataType
from megatron.core.export.export_config import ExportConfig
from megatron.core.export.trtllm.model_to_trllm_mapping.default_conversion_dict import DEFAULT_CONVERSION_DICT
from megatron.core.export.trtllm.trtllm_weights_converter.single_device_trtllm_model_weights_converter import (
    SingleDeviceTRTLLMModelWeightsConverter,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_mapo.config.adapters import LoraConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.lora import add_lora
from nemo_mapo.rollout.trtllm.weights import exported_weights
from nemo_mapo.testing.tiny import SAMPLE_RATE, TinyAudioLLM, tiny_audio_llm, tiny_model_config
from nemo_mapo.types import AudioBatch


@pytest.fixture(params=[True, False], ids=["tied head", "untied head"])
def tiny(request: pytest.FixtureRequest) -> TinyAudioLLM:
    return tiny_audio_llm(tied=request.param, qk_layernorm=False)


@pytest.fixture
def type_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one function that Megatron-core's converter asks of TensorRT-LLM: a type by its name."""
    package, utilities = ModuleType("tensorrt_llm"), ModuleType("tensorrt_llm._utils")
    utilities.str_dtype_to_torch = lambda name: {"float32": torch.float32}[name]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt_llm", package)
    monkeypatch.setitem(sys.modules, "tensorrt_llm._utils", utilities)


def converted(tiny: TinyAudioLLM) -> dict[str, Tensor]:
    """The tensors that Megatron-core hands to TensorRT-LLM, by their names there."""
    converter = SingleDeviceTRTLLMModelWeightsConverter(
        export_config=ExportConfig(),
        transformer_config=tiny.model.config,
        dtype=DataType.float32,
        activation="swiglu",
    )
    converter.convert(exported_weights(tiny.model), DEFAULT_CONVERSION_DICT)
    return {name.removesuffix(".0.bin"): value for name, value in converter.trtllm_model_weights.items()}


def as_llama(tiny: TinyAudioLLM, weights: dict[str, Tensor]) -> LlamaForCausalLM:
    """What TensorRT-LLM computes with tensors of these names: its llama is that of transformers.

    In its gated feed-forward the activation is on `fc`, and `gate` is multiplied with it.
    """
    decoder = tiny.config.decoder
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tiny.model.vocab_size,
            hidden_size=decoder.hidden_size,
            intermediate_size=decoder.ffn_hidden_size,
            num_hidden_layers=decoder.num_layers,
            num_attention_heads=decoder.num_attention_heads,
            num_key_value_heads=decoder.num_query_groups,
            head_dim=decoder.kv_channels,
            rms_norm_eps=decoder.layernorm_epsilon,
            rope_theta=decoder.rotary_base,
            tie_word_embeddings=False,
        )
    )
    wide, narrow = (heads * decoder.kv_channels for heads in (decoder.num_attention_heads, decoder.num_query_groups))
    state = {
        "model.embed_tokens.weight": weights["transformer.vocab_embedding.weight"],
        "model.norm.weight": weights["transformer.ln_f.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for layer in range(decoder.num_layers):
        theirs, ours = f"model.layers.{layer}", f"transformer.layers.{layer}"
        query, key, value = weights[f"{ours}.attention.qkv.weight"].split([wide, narrow, narrow])
        state |= {
            f"{theirs}.input_layernorm.weight": weights[f"{ours}.input_layernorm.weight"],
            f"{theirs}.post_attention_layernorm.weight": weights[f"{ours}.post_layernorm.weight"],
            f"{theirs}.self_attn.q_proj.weight": query,
            f"{theirs}.self_attn.k_proj.weight": key,
            f"{theirs}.self_attn.v_proj.weight": value,
            f"{theirs}.self_attn.o_proj.weight": weights[f"{ours}.attention.dense.weight"],
            f"{theirs}.mlp.gate_proj.weight": weights[f"{ours}.mlp.fc.weight"],
            f"{theirs}.mlp.up_proj.weight": weights[f"{ours}.mlp.gate.weight"],
            f"{theirs}.mlp.down_proj.weight": weights[f"{ours}.mlp.proj.weight"],
        }
    llama.load_state_dict(state)
    return llama.eval()


@torch.no_grad()
def test_a_llama_with_the_exported_weights_computes_what_the_policy_computes(tiny: TinyAudioLLM, type_names: None):
    tokens = torch.randint(0, tiny.model.vocab_size, (3, 11), generator=torch.Generator().manual_seed(0))
    tokens[tokens == tiny.model.audio_token_id] = 0
    silence = AudioBatch(waveforms=torch.zeros(0, 0), lengths=torch.zeros(0, dtype=torch.int64))
    ours = tiny.model.eval()(tokens, silence, torch.tensor([-1, -1, -1])).logits
    torch.testing.assert_close(as_llama(tiny, converted(tiny))(tokens).logits, ours, rtol=1e-4, atol=1e-4)


def test_nothing_is_copied_and_perception_stays_outside(tiny: TinyAudioLLM):
    weights = exported_weights(tiny.model)
    own = {parameter.data_ptr() for parameter in tiny.model.language_model.parameters()}
    assert {tensor.data_ptr() for tensor in weights.values()} == own
    assert not any(tensor.requires_grad for tensor in weights.values())


@torch.no_grad()
def test_adapters_are_merged_and_stay_what_they_are():
    tiny = tiny_audio_llm(qk_layernorm=False)
    plain = exported_weights(tiny.model)["decoder.layers.0.mlp.linear_fc2.weight"].clone()
    add_lora(tiny.model.language_model, LoraConfig(rank=2, alpha=6.0), seed=0)
    adapter = tiny.model.language_model.decoder.layers[0].mlp.linear_fc2
    adapter.lora_b.normal_()
    merged = exported_weights(tiny.model)
    expected = plain + 3.0 * adapter.lora_b @ adapter.lora_a
    torch.testing.assert_close(merged["decoder.layers.0.mlp.linear_fc2.weight"], expected)
    assert not any("lora" in name for name in merged)
    assert torch.equal(adapter.weight, plain)


def test_a_tied_head_is_written_out():
    weights = exported_weights(tiny_audio_llm(tied=True, qk_layernorm=False).model)
    assert torch.equal(weights["output_layer.weight"], weights["embedding.word_embeddings.weight"])


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"qk_layernorm": True}, "q_layernorm.weight|k_layernorm.weight"),
        ({"add_qkv_bias": True}, "linear_qkv.bias"),
        ({"num_moe_experts": 2}, "router.weight|experts"),
    ],
)
def test_what_a_llama_has_no_place_for_is_refused(change: dict[str, object], tensor: str):
    config = tiny_model_config(qk_layernorm=False)
    model = AudioLLM(
        replace(config, decoder=replace(config.decoder, **change)),
        vocab_size=40,
        audio_token_id=0,
        sample_rate=SAMPLE_RATE,
    )
    with pytest.raises(ValueError, match=f"no place for decoder.layers.0.*({tensor})"):
        exported_weights(model)
