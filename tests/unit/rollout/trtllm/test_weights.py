"""Names and layouts of the exported decoder, against Megatron-core's converter and a llama of transformers."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from megatron.core.export.data_type import DataType
from megatron.core.export.trtllm.model_to_trllm_mapping.default_conversion_dict import DEFAULT_CONVERSION_DICT
from megatron.core.export.trtllm.trtllm_weights_converter.distributed_trtllm_model_weights_converter import (
    DistributedTRTLLMModelWeightsConverter,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_mapo.config.adapters import LoraConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.lora import add_lora
from nemo_mapo.rollout.trtllm.weights import exported_weights, placed_weights
from nemo_mapo.types import AudioBatch
from support.tiny import SAMPLE_RATE, TinyAudioLLM, tiny_audio_llm, tiny_model_config


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


class OnTheCpu(DistributedTRTLLMModelWeightsConverter):
    """Megatron-core's converter, which the engine uses, with room in ordinary memory: pinned memory needs a GPU."""

    def _add_to_trtllm_model_weights(self, val: Tensor, layer_name: str) -> None:
        shape = val.reshape(val.shape[0], -1).T.shape if val.ndim > 1 else val.shape
        self.trtllm_model_weights.setdefault(layer_name, torch.empty(shape, dtype=self.storage_type))
        super()._add_to_trtllm_model_weights(val, layer_name)


def converter_of(tiny: TinyAudioLLM) -> OnTheCpu:
    return OnTheCpu(transformer_config=tiny.model.config, dtype=DataType.float32, activation="swiglu")


def converted(tiny: TinyAudioLLM, converter: OnTheCpu) -> dict[str, Tensor]:
    """The tensors that Megatron-core hands to TensorRT-LLM, by their names there."""
    converter.convert(exported_weights(tiny.model), DEFAULT_CONVERSION_DICT, tiny.model.vocab_size)
    return converter.trtllm_model_weights


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
def policy_logits(tiny: TinyAudioLLM, tokens: Tensor) -> Tensor:
    silence = AudioBatch(waveforms=torch.zeros(0, 0), lengths=torch.zeros(0, dtype=torch.int64))
    logits: Tensor = tiny.model.eval()(tokens, silence, torch.full((len(tokens),), -1)).logits
    return logits


@torch.no_grad()
def test_a_llama_with_the_exported_weights_computes_what_the_policy_computes(tiny: TinyAudioLLM, type_names: None):
    tokens = torch.randint(0, tiny.model.vocab_size, (3, 11), generator=torch.Generator().manual_seed(0))
    tokens[tokens == tiny.model.audio_token_id] = 0
    converter = converter_of(tiny)
    theirs = as_llama(tiny, converted(tiny, converter))(tokens).logits
    torch.testing.assert_close(theirs, policy_logits(tiny, tokens), rtol=1e-4, atol=1e-4)
    # The next update goes through the same converter, into the same memory.
    for parameter in tiny.model.language_model.parameters():
        parameter.mul_(1.1)
    theirs = as_llama(tiny, converted(tiny, converter))(tokens).logits
    torch.testing.assert_close(theirs, policy_logits(tiny, tokens), rtol=1e-4, atol=1e-4)


NAMES = {"transformer.vocab_embedding.weight", "lm_head.weight", "a.mlp.gate.weight", "a.mlp.fc.weight"}


def named(*, tied: bool = False) -> dict[str, Tensor]:
    weights = {name: torch.full((2, 3), float(number)) for number, name in enumerate(sorted(NAMES))}
    if tied:
        weights["lm_head.weight"] = weights["transformer.vocab_embedding.weight"].clone()
    return weights


def test_weights_whose_names_an_engine_has_stay_as_they_are_and_its_constants_are_its_own():
    assert placed_weights(named(), NAMES | {"rotary_inv_freq"}).keys() == NAMES


def test_an_engine_with_fused_feed_forwards_gets_gate_and_fc_in_one():
    weights = named()
    fused = NAMES - {"a.mlp.gate.weight", "a.mlp.fc.weight"} | {"a.mlp.fused_fc.weight"}
    placed = placed_weights(weights, fused)
    assert placed.keys() == fused
    expected = torch.cat([weights["a.mlp.gate.weight"], weights["a.mlp.fc.weight"]])
    assert torch.equal(placed["a.mlp.fused_fc.weight"], expected)


@pytest.mark.parametrize("kept", ["lm_head.weight", "transformer.vocab_embedding.weight"])
def test_an_engine_that_tied_the_head_gets_it_once(kept: str):
    names = NAMES - {"lm_head.weight", "transformer.vocab_embedding.weight"} | {kept}
    assert placed_weights(named(tied=True), names).keys() == names
    with pytest.raises(ValueError, match=r"engine has no weight (lm_head|transformer\.vocab_embedding)\.weight"):
        placed_weights(named(), names)


def test_a_weight_that_would_be_ignored_or_stay_old_is_an_error():
    with pytest.raises(ValueError, match=r"has no weight a\.mlp\.fc\.weight \(1 such\)"):
        placed_weights(named(), NAMES - {"a.mlp.fc.weight"})
    with pytest.raises(ValueError, match=r"would keep its old b\.bias \(1 such\)"):
        placed_weights(named(), NAMES | {"b.bias"})


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
