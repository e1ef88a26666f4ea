"""LoRA: the decoder's base stays what it is, and the adapters compute what dense weights W + scale * B A would."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from pydantic import ValidationError
from torch import Tensor, nn
from torch.func import functional_call

from nemo_mapo.config.adapters import FreezeConfig, LoraConfig
from nemo_mapo.config.model import NemoPerceptionConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.lora import LoraLinear, adapters_off, add_lora, freeze, is_adapter, merged_state_dict
from support.layouts import build, dense_config, moe_config
from support.tiny import SAMPLE_RATE, TinyAudioLLM, tiny_audio_llm, tiny_batch, tiny_model_config

LORA = LoraConfig(rank=3, alpha=6.0)
ATTENTION = LoraConfig(rank=3, targets=("linear_qkv", "linear_proj"))
NEMO_PERCEPTION = Path(__file__).parents[3] / "conf" / "model" / "perception" / "nemo.yaml"


def adapted(config: LoraConfig = LORA, *, dtype: torch.dtype = torch.float32, fresh: bool = False) -> TinyAudioLLM:
    tiny = tiny_audio_llm(dtype=dtype)
    add_lora(tiny.model.language_model, config, seed=7)
    if not fresh:
        draw_adapters(tiny.model)
    return tiny


@torch.no_grad()
def draw_adapters(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.normal_(std=0.2, generator=generator)


def logits_of(tiny: TinyAudioLLM, weights: dict[str, Tensor] | None = None) -> Tensor:
    """Logits of some prompts, with other weights if any are given."""
    prompts = tiny_batch(tiny, num_prompts=2)
    return functional_call(tiny.model, weights or {}, (prompts.tokens, prompts.audio, prompts.audio_row)).logits


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


@torch.no_grad()
def test_an_adapted_linear_adds_alpha_over_rank_times_b_a_x():
    tiny = adapted(LoraConfig(rank=2, alpha=6.0))
    linear = tiny.model.language_model.decoder.layers[0].mlp.linear_fc2
    for parameter in (linear.weight, linear.lora_a, linear.lora_b):
        parameter.zero_()
    linear.weight[0, 0], linear.lora_a[0, 1], linear.lora_b[3, 0] = 2.0, 5.0, 7.0
    hidden = torch.zeros(1, 1, linear.input_size)
    hidden[0, 0, 0], hidden[0, 0, 1] = 11.0, 13.0
    output, bias = linear(hidden)
    expected = torch.zeros_like(output)
    expected[0, 0, 0] = 2 * 11
    expected[0, 0, 3] = (6 / 2) * 7 * 5 * 13
    assert torch.equal(output, expected)
    assert bias is None


def test_logits_and_adapter_gradients_are_those_of_dense_weights():
    tiny, plain = adapted(dtype=torch.float64), tiny_audio_llm(dtype=torch.float64)
    loss_weights = torch.randn(logits_of(plain).shape, dtype=torch.float64)
    logits = logits_of(tiny)
    (logits * loss_weights).sum().backward()
    leaves = {name: value.detach().clone().requires_grad_() for name, value in adapters(tiny.model).items()}
    dense = {}
    for name, linear in tiny.model.named_modules():
        if isinstance(linear, LoraLinear):
            update = 2.0 * leaves[f"{name}.lora_b"] @ leaves[f"{name}.lora_a"]
            dense[f"{name}.weight"] = plain.model.get_parameter(f"{name}.weight").detach() + update
    expected = logits_of(plain, dense)
    (expected * loss_weights).sum().backward()
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=0)
    assert len(leaves) == 2 * 4 * 2, "two layers, four projections, A and B"
    for name, parameter in adapters(tiny.model).items():
        torch.testing.assert_close(parameter.grad, leaves[name].grad, atol=1e-9, rtol=1e-9)
        assert parameter.grad.abs().max() > 0


@torch.no_grad()
def test_fresh_adapters_change_nothing():
    assert torch.equal(logits_of(adapted(fresh=True)), logits_of(tiny_audio_llm()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_its_adapters_the_model_is_its_base_bit_for_bit(dtype):
    tiny = adapted(dtype=dtype)
    base = logits_of(tiny_audio_llm(dtype=dtype))
    with_adapters = logits_of(tiny)
    assert not torch.equal(with_adapters, base)
    with adapters_off(tiny.model):
        assert torch.equal(logits_of(tiny), base)
    assert torch.equal(logits_of(tiny), with_adapters)


@torch.no_grad()
def test_adapters_come_back_only_when_the_outermost_block_ends():
    tiny = adapted()
    base = logits_of(tiny_audio_llm())
    with adapters_off(tiny.model):
        with adapters_off(tiny.model.language_model):
            pass
        assert torch.equal(logits_of(tiny), base)
    assert not torch.equal(logits_of(tiny), base)


@torch.no_grad()
def test_adapters_come_back_after_an_error():
    tiny = adapted()
    before = logits_of(tiny)
    with pytest.raises(KeyError), adapters_off(tiny.model):
        raise KeyError
    assert torch.equal(logits_of(tiny), before)


def test_adapters_cannot_be_switched_off_where_there_is_a_gradient_or_no_adapter():
    with pytest.raises(AssertionError, match="no_grad"), adapters_off(adapted().model):
        pass
    with torch.no_grad(), pytest.raises(AssertionError, match="without adapters"), adapters_off(tiny_audio_llm().model):
        pass


@torch.no_grad()
def test_the_merged_state_is_the_base_with_other_weights_and_leaves_the_base_alone():
    # In float64: what float32 rounds off over two layers is more than what is asked of the merge.
    tiny, plain = adapted(dtype=torch.float64), tiny_audio_llm(dtype=torch.float64)
    before = state(tiny.model)
    merged = merged_state_dict(tiny.model.language_model)
    assert merged.keys() == plain.model.language_model.state_dict().keys()
    plain.model.language_model.load_state_dict(merged)
    torch.testing.assert_close(logits_of(plain), logits_of(tiny), atol=1e-12, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in state(tiny.model).items())
    with adapters_off(tiny.model):
        assert torch.equal(logits_of(tiny), logits_of(tiny_audio_llm(dtype=torch.float64)))


@torch.no_grad()
def test_a_merged_bfloat16_weight_is_rounded_once():
    linear = adapted(dtype=torch.bfloat16).model.language_model.decoder.layers[0].self_attention.linear_qkv
    exact = linear.weight.double() + 2.0 * linear.lora_b.double() @ linear.lora_a.double()
    merged = linear.merged_weight()
    assert merged.dtype == torch.bfloat16
    assert (merged.double() - exact).abs().max() <= exact.abs().max() * 2.0**-8


def test_only_the_adapters_of_the_targets_are_trained():
    model = adapted(ATTENTION).model.language_model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        f"decoder.layers.{layer}.self_attention.{target}.{matrix}"
        for layer in range(2)
        for target in ATTENTION.targets
        for matrix in ("lora_a", "lora_b")
    }


def test_fresh_adapters_depend_on_seed_and_layer_and_on_nothing_else():
    tiny = tiny_audio_llm()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    add_lora(tiny.model.language_model, LORA, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    first, again = adapters(tiny.model), adapters(adapted(fresh=True).model)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    other = tiny_audio_llm()
    add_lora(other.model.language_model, LORA, seed=8)
    drawn = [value for values in (first, adapters(other.model)) for name, value in values.items() if "lora_a" in name]
    assert len({tuple(value.flatten()[:3].tolist()) for value in drawn}) == len(drawn)
    for name, value in first.items():
        bound = 0.0 if "lora_b" in name else value.shape[1] ** -0.5
        assert 0.8 * bound <= value.abs().max() <= bound


def everything_frozen_but_adapters(**decoder: object) -> AudioLLM:
    model = build(dense_config(**decoder))
    add_lora(model.language_model, LORA, seed=7)
    freeze(model, FreezeConfig(perception=True, projector=True, decoder=True))
    draw_adapters(model)
    return model


def test_recomputed_layers_give_their_adapters_the_same_gradient_when_nothing_below_is_trained():
    gradients = []
    for granularity in (None, "full"):
        model = everything_frozen_but_adapters(recompute_granularity=granularity)
        config = dense_config()
        tiny = TinyAudioLLM(config=config, model=model, tokenizer=tiny_audio_llm().tokenizer)
        logits_of(tiny).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in adapters(model).items()})
    plain, recomputed = gradients
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)
        assert gradient.abs().max() > 0


def sharded_keys(model: AudioLLM) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a checkpoint calls each parameter, and its shape there."""
    found = {}
    for name, value in model.sharded_state_dict().items():
        if isinstance(value, ShardedTensorFactory):
            value = value.build()[0]
        if isinstance(value, ShardedTensor):
            found[name] = (value.key, value.global_shape)
    return found


def test_a_checkpoint_calls_the_base_what_it_calls_a_decoder_without_adapters():
    plain, with_adapters = sharded_keys(tiny_audio_llm().model), sharded_keys(adapted().model)
    assert {name: key for name, key in with_adapters.items() if not is_adapter(name)} == plain
    assert len(with_adapters) == len(plain) + 2 * 4 * 2


@torch.no_grad()
def test_a_checkpoint_of_the_base_loads_under_fresh_adapters(tmp_path):
    saved = tiny_audio_llm(seed=3)
    dist_checkpointing.save(saved.model.sharded_state_dict(), str(tmp_path))
    tiny = adapted(fresh=True)
    fresh = {name: value.clone() for name, value in adapters(tiny.model).items()}
    base = {name: value for name, value in tiny.model.sharded_state_dict().items() if not is_adapter(name)}
    tiny.model.load_state_dict(dist_checkpointing.load(base, str(tmp_path)), strict=False)
    assert torch.equal(logits_of(tiny), logits_of(saved))
    assert all(torch.equal(value, fresh[name]) for name, value in adapters(tiny.model).items())


def test_every_expert_has_adapters_of_its_own():
    model = build(moe_config()).language_model
    add_lora(model, LORA, seed=7)
    found = {name: value for name, value in adapters(model).items() if name.endswith("lora_a")}
    assert len(found) == 4 * (2 + 4 * 2)
    assert len({float(value.detach().sum()) for value in found.values()}) == len(found)


def test_a_second_set_of_adapters_is_refused():
    with pytest.raises(ValueError, match=r"Lora\w+ParallelLinear cannot have an adapter"):
        add_lora(adapted().model.language_model, LORA, seed=7)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"targets": ("linear_q",)}, "linear_qkv"),
        ({"targets": ()}, "at least 1 item"),
        ({"targets": ("linear_qkv", "linear_qkv")}, "names a projection twice"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"alpha": 0.0}, "greater than 0"),
        ({"alpha": float("inf")}, "finite"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_the_config_refuses_what_it_does_not_know(wrong, message):
    with pytest.raises(ValidationError, match=message):
        LoraConfig(**wrong)


def nemo_audio_llm() -> AudioLLM:
    module = yaml.safe_load(NEMO_PERCEPTION.read_text())["module"]
    config = replace(tiny_model_config(), perception=NemoPerceptionConfig(module=module))
    return AudioLLM(config, vocab_size=100, audio_token_id=6, sample_rate=SAMPLE_RATE)


def trained_parts(model: AudioLLM) -> set[str]:
    return {
        ".".join(name.split(".")[:3] if "module." in name else name.split(".")[:2])
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


CONV = {"perception.convolutions", "perception.context"}
CONV_PROJECTOR = {"perception.projection"}
NEMO = {"perception.module.encoder"}
NEMO_PROJECTOR = {"perception.module.proj"}
DECODER = {"language_model.embedding", "language_model.decoder"}


@pytest.mark.parametrize(
    ("config", "conv", "nemo"),
    [
        (FreezeConfig(), CONV | CONV_PROJECTOR | DECODER, NEMO | NEMO_PROJECTOR | DECODER),
        (FreezeConfig(perception=True), CONV_PROJECTOR | DECODER, NEMO_PROJECTOR | DECODER),
        (FreezeConfig(projector=True), CONV | DECODER, NEMO | DECODER),
        (FreezeConfig(decoder=True), CONV | CONV_PROJECTOR, NEMO | NEMO_PROJECTOR),
        (FreezeConfig(perception=True, projector=True, decoder=True), set(), set()),
    ],
    ids=["nothing", "perception", "projector", "decoder", "all"],
)
def test_each_part_is_frozen_on_its_own(config, conv, nemo):
    for model, expected in ((tiny_audio_llm().model, conv), (nemo_audio_llm(), nemo)):
        freeze(model, config)
        assert trained_parts(model) == expected


def test_freezing_the_decoder_leaves_its_adapters_and_adapters_leave_perception_alone():
    model = adapted(fresh=True).model
    freeze(model, FreezeConfig(decoder=True))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if not is_adapter(name)} == {
        f"perception.{name}" for name, _ in model.perception.named_parameters()
    }
    assert adapters(model).keys() <= trained
