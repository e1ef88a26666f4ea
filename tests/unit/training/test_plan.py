"""The planner's arithmetic on numbers worked out by hand, its refusals, and the command."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from forked_commands import run
from nemo_mapo.config.adapters import FreezeConfig
from nemo_mapo.config.load import load
from nemo_mapo.config.model import ConvPerceptionConfig, DecoderConfig, ModelConfig, NemoPerceptionConfig
from nemo_mapo.config.plan import PlanConfig
from nemo_mapo.training.plan import Plan, StagePlan, StaticMemory, buffer_elements, too_large
from nemo_mapo.training.plan_activations import (
    MicroBatch,
    kv_cache_bytes,
    layer_bytes,
    logits_bytes,
    perception_bytes,
    stage_bytes,
)
from nemo_mapo.upstream.megatron import SWIGLU_KEEPS

ROOT = Path(__file__).parents[3]
DECODER = DecoderConfig(
    num_layers=4,
    hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    ffn_hidden_size=32,
    qk_layernorm=False,
)
MODEL = ModelConfig(decoder=DECODER, target_layers=(3,), perception=ConvPerceptionConfig(mel_bins=10, channels=6))
BATCH = MicroBatch(tokens=10, clips=2, audio_seconds=0.8, vocab_size=100, width=2, measures_mass=True, cuda=True)


def test_keys_and_values_of_every_layer_and_position() -> None:
    # 2 (key, value) x 3 rows x 5 tokens x 4 layers x 2 heads x 8 wide x 2 bytes
    assert kv_cache_bytes(MODEL, rows=3, tokens=5, width=2) == 2 * 3 * 5 * 4 * 2 * 8 * 2
    split = replace(MODEL, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert kv_cache_bytes(split, rows=3, tokens=5, width=2) == kv_cache_bytes(MODEL, rows=3, tokens=5, width=2) / 4


def test_logits_are_kept_once_and_their_gradient_and_the_workspace_come_on_top() -> None:
    assert logits_bytes(MODEL, BATCH) == (10 * 100 * 2, 10 * 100 * 2 + 10 * 100 * 4)
    many = replace(BATCH, tokens=10**6)
    assert logits_bytes(MODEL, many)[1] == 10**6 * 100 * 2 + 2**26 * 4, "the workspace has a limit"


def test_a_layer_on_a_gpu_keeps_what_its_gradients_need() -> None:
    norms_and_linear_inputs = 2 * (10 * (16 * 2 + 4) + 10 * 16 * 2)
    attention = 10 * (4 + 2 * 2) * 8 * 2 + 10 * (4 + 2) * 8 * 2 + 10 * 4 * 4 + 10 * 4 * 8 * 2
    feed_forward = SWIGLU_KEEPS * 10 * 32 * 2 + 10 * 32 * 2
    assert layer_bytes(MODEL, BATCH, target=False) == norms_and_linear_inputs + attention + feed_forward


def test_a_target_layer_keeps_heads_that_are_wider_by_the_measuring_channel() -> None:
    wider = 10 * 2 * (4 + 2) * 16 * 2 + 10 * 4 * 8 * 2
    plain = 10 * (4 + 2) * 8 * 2 + 10 * 4 * 8 * 2
    assert layer_bytes(MODEL, BATCH, target=True) - layer_bytes(MODEL, BATCH, target=False) == wider - plain


def test_full_recompute_keeps_the_inputs_of_the_layers_below_the_targets() -> None:
    recomputed = replace(MODEL, decoder=replace(DECODER, recompute_granularity="full"))
    saved = stage_bytes(MODEL, BATCH, 0) - stage_bytes(recomputed, BATCH, 0)
    assert saved == 3 * (layer_bytes(MODEL, BATCH, target=False) - 10 * 16 * 2)


def test_without_a_measured_mass_no_layer_is_a_target() -> None:
    without = stage_bytes(MODEL, replace(BATCH, measures_mass=False), 0)
    assert stage_bytes(MODEL, BATCH, 0) - without == layer_bytes(MODEL, BATCH, target=True) - layer_bytes(
        MODEL, BATCH, target=False
    )


def test_a_frozen_encoder_keeps_nothing_and_one_without_a_formula_says_so() -> None:
    # 40 frames, halved twice: 20, 10; two clips of bf16
    trained = 2 * 2 * (10 * 40 + 2 * 6 * 20 + 2 * 6 * 10 + 6 * 10 + 2 * 6 * 10)
    assert perception_bytes(MODEL, BATCH) == trained
    frozen = FreezeConfig(perception=True, projector=True)
    assert perception_bytes(replace(MODEL, freeze=frozen), BATCH) == 0
    other = replace(MODEL, perception=NemoPerceptionConfig(module={}))
    assert perception_bytes(other, BATCH) is None
    assert perception_bytes(replace(other, freeze=frozen), BATCH) == 0


def test_a_buffer_without_sharing_out_has_no_padding() -> None:
    group = [torch.nn.Parameter(torch.zeros(n)) for n in (5, 70)]
    assert buffer_elements(group, replicas=None) == 75


def test_a_buffer_that_is_shared_out_aligns_parameters_and_its_end() -> None:
    group = [torch.nn.Parameter(torch.zeros(n)) for n in (5, 70)]
    # 70, then from 128 to 133, up to a multiple of 128 that 3 ranks divide
    assert buffer_elements(group, replicas=1) == 256
    assert buffer_elements(group, replicas=3) == 384


def plan_of(**sizes: int) -> Plan:
    static = StaticMemory(
        **{"weights": 10**9, "gradients": 0, "optimizer": 0, "reference": 0, "trained": 1}
        | {name: size for name, size in sizes.items() if name in ("weights", "optimizer", "reference")}
    )
    dynamic = dict.fromkeys(("activations", "perception", "logits", "kv_cache", "offloaded"), 0)
    dynamic |= {name: size for name, size in sizes.items() if name in dynamic}
    return Plan(stages=(StagePlan(static=static, **dynamic),), tokens_per_step=1, tokens_per_pass=1, left_out=())


def test_the_peak_is_what_is_held_and_the_larger_of_training_and_generation() -> None:
    (stage,) = plan_of(activations=5, logits=3, kv_cache=7, reference=100).stages
    assert stage.peak == 10**9 + 100 + 8
    (stage,) = plan_of(activations=5, logits=3, kv_cache=9).stages
    assert stage.peak == 10**9 + 9


@pytest.mark.parametrize(
    ("part", "lever"),
    [
        ("activations", "model.micro_batch_size or recompute"),
        ("kv_cache", "rollout.batch_size"),
        ("optimizer", "model.lora"),
        ("reference", "model.offload_reference=true"),
        ("weights", "tensor, pipeline or expert parallelism"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_largest_part_and_what_makes_it_smaller(part: str, lever: str) -> None:
    limits = PlanConfig(gpu_memory_gb=24, reserved_gb=4)
    assert too_large(plan_of(**{part: 18 * 10**9}), limits) is None
    problem = too_large(plan_of(**{part: 25 * 10**9}), limits)
    assert problem is not None
    assert "leaves 20.0 GB" in problem
    assert lever in problem


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("plan.gpu_memory=40", "plan.gpu_memory=40: unknown key; did you mean gpu_memory_gb"),
        ("plan.reserved_gb=-1", "plan.reserved_gb=-1: Input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_key_or_value_of_the_planner_is_named(override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load(OmegaConf.from_dotlist([override]).plan, PlanConfig, under="plan")


def test_the_command_plans_and_refuses() -> None:
    small = run("plan.py", "plan.vocab_size=300", "plan.gpu_memory_gb=6.5")
    assert small.returncode == 3, small.stderr
    assert "does not fit: pipeline stage 0 needs" in small.stdout
    wrong = run("plan.py", "plan.vocab_size=300", "trainer.devices=0")
    assert wrong.returncode == 2
    assert "trainer.devices=0" in wrong.stderr
    assert "Traceback" not in wrong.stderr
