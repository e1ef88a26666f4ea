"""The plan's weights, gradients and optimiser state are what ranks of every layout really hold."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from distributed.plan_ranks import (
    activations,
    built_memory,
    of_each,
    padded_buffers,
    planned,
    planned_memory,
    run_config,
    shared_activations,
)

from nemo_mapo.config.adapters import FreezeConfig, LoraConfig
from nemo_mapo.config.model import ModelConfig
from nemo_mapo.config.plan import PlanConfig
from nemo_mapo.training.plan import StaticMemory, as_table, too_large
from nemo_mapo.training.plan_activations import SharedPrompts, kv_cache_bytes
from support.layouts import dense_config, moe_config
from support.ranks import run_on_ranks
from support.tiny import tiny_tokenizer

pytestmark = pytest.mark.distributed

VOCABULARY = len(tiny_tokenizer())
ESTIMATE = 0.1
"""The estimates are meant to be within 0.2; they are within 0.07, and a forgotten term should show."""
TENSOR = {"tensor_model_parallel_size": 2}
SEQUENCE = {**TENSOR, "sequence_parallel": True}
PIPELINE = {"pipeline_model_parallel_size": 2}
EXPERT = {"expert_model_parallel_size": 2}
LORA = {"lora": LoraConfig(rank=3, alpha=6.0)}
ATTENTION_LORA = {"lora": LoraConfig(rank=3, targets=("linear_qkv", "linear_proj"))}
UNTIED = {"share_embeddings_and_output_weights": False}


def model(base: ModelConfig, *, decoder: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    return replace(base, decoder=replace(base.decoder, **decoder or {}), **changes)


LAYOUTS = {
    "plain": (1, dense_config(), "fp32"),
    "bf16": (1, dense_config(), "bf16"),
    "untied": (1, model(dense_config(), decoder=UNTIED), "fp32"),
    "frozen encoder": (1, model(dense_config(), freeze=FreezeConfig(perception=True)), "bf16"),
    "frozen decoder": (1, model(dense_config(), freeze=FreezeConfig(decoder=True)), "fp32"),
    "LoRA": (1, model(dense_config(), **LORA), "bf16"),
    "experts": (1, moe_config(), "fp32"),
    "tensor 2": (2, model(dense_config(), **TENSOR), "bf16"),
    "tensor 2, sequence, LoRA": (2, model(dense_config(), **SEQUENCE, **LORA), "fp32"),
    "pipeline 2": (2, model(dense_config(), **PIPELINE), "bf16"),
    "pipeline 2, untied, LoRA": (2, model(dense_config(), decoder=UNTIED, **PIPELINE, **LORA), "fp32"),
    "data 2": (2, dense_config(), "fp32"),
    "expert 2": (2, model(moe_config(), **EXPERT), "bf16"),
    "expert 2, LoRA on attention": (2, model(moe_config(), **EXPERT, **ATTENTION_LORA), "fp32"),
    "tensor 2, pipeline 2": (4, model(dense_config(), **SEQUENCE, **PIPELINE), "fp32"),
    "tensor 2, pipeline 2, experts": (4, model(moe_config(), **SEQUENCE, **PIPELINE), "fp32"),
}


Case = tuple[int, ModelConfig, str]


def on_ranks(function: Callable[..., Any], cases: dict[str, Case]) -> dict[str, list[Any]]:
    """What the function gives on each rank of each case."""
    found = {}
    for ranks in sorted({ranks for ranks, _, _ in cases.values()}):
        models = {name: (config, precision) for name, (needed, config, precision) in cases.items() if needed == ranks}
        by_rank = run_on_ranks(of_each, ranks, function, models)
        found |= {name: [results[name] for results in by_rank] for name in models}
    return found


@pytest.fixture(scope="module")
def stages() -> dict[str, list[StaticMemory]]:
    """The plan of every layout."""
    runs = {
        name: run_config(config, ranks=ranks, precision=precision)
        for name, (ranks, config, precision) in LAYOUTS.items()
    }
    (planned_stages,) = run_on_ranks(planned_memory, 1, runs, VOCABULARY)
    return planned_stages


@pytest.fixture(scope="module")
def held() -> dict[str, list[StaticMemory]]:
    """What the ranks of every layout hold."""
    return on_ranks(built_memory, LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_holds_what_is_planned_for_its_stage(stages, held, name: str) -> None:
    ranks, config, _ = LAYOUTS[name]
    per_stage = ranks // config.pipeline_model_parallel_size
    assert held[name] == [stages[name][rank // per_stage] for rank in range(ranks)]


def test_what_is_planned_differs_between_layouts(stages) -> None:
    assert len({tuple(planned_stages) for planned_stages in stages.values()}) == len(LAYOUTS) - 1, (
        "data 2 is like plain"
    )


BUFFERS = {
    "plain": (1, dense_config(), "bf16"),
    "data 2": (2, dense_config(), "bf16"),
    "pipeline 2, tied": (2, model(dense_config(), **PIPELINE), "bf16"),
    "expert 2": (2, model(moe_config(), **EXPERT), "bf16"),
    "pipeline 2 and data 2, tied": (4, model(dense_config(), **PIPELINE), "bf16"),
}


def test_buffers_of_the_distributed_optimiser_are_padded_as_megatron_pads_them() -> None:
    for name, by_rank in on_ranks(padded_buffers, BUFFERS).items():
        for buffers in by_rank:
            assert buffers
            assert [made for made, _ in buffers] == [elements for _, elements in buffers], name


ACTIVATIONS = {
    "plain": (1, dense_config(), "fp32"),
    "bf16": (1, dense_config(), "bf16"),
    "no norm of queries and keys": (1, model(dense_config(), decoder={"qk_layernorm": False}), "fp32"),
    "wide feed-forward": (1, model(dense_config(), decoder={"ffn_hidden_size": 256}), "fp32"),
    "narrow heads": (1, model(dense_config(), decoder={"hidden_size": 128, "kv_channels": 16}), "bf16"),
    "LoRA": (1, model(dense_config(), **LORA), "fp32"),
    "LoRA in bf16": (1, model(dense_config(), **LORA), "bf16"),
    "frozen encoder": (1, model(dense_config(), freeze=FreezeConfig(perception=True, projector=True)), "fp32"),
    "frozen decoder": (1, model(dense_config(), freeze=FreezeConfig(decoder=True)), "fp32"),
    "full recompute": (1, model(dense_config(), decoder={"recompute_granularity": "full"}), "fp32"),
    "selective recompute": (
        1,
        model(
            dense_config(), decoder={"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")}
        ),
        "fp32",
    ),
    "recomputed norms": (
        1,
        model(dense_config(), decoder={"recompute_granularity": "selective", "recompute_modules": ("layernorm",)}),
        "fp32",
    ),
    "experts": (1, moe_config(), "fp32"),
    "experts in bf16": (1, moe_config(), "bf16"),
    "experts, LoRA on attention": (1, model(moe_config(), **ATTENTION_LORA), "fp32"),
    "recomputed experts": (
        1,
        model(moe_config(), decoder={"recompute_granularity": "selective", "recompute_modules": ("moe",)}),
        "fp32",
    ),
    "tensor 2": (2, model(dense_config(), **TENSOR), "fp32"),
    "tensor 2, sequence": (2, model(dense_config(), **SEQUENCE), "fp32"),
    "tensor 2, sequence, LoRA": (2, model(dense_config(), **SEQUENCE, **LORA), "fp32"),
    "tensor 2, sequence, experts": (2, model(moe_config(), **SEQUENCE), "fp32"),
}


@pytest.fixture(scope="module")
def kept() -> dict[str, list[tuple[int, int]]]:
    """Activations of every case, measured and estimated."""
    return on_ranks(activations, ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_planned_activations_are_near_what_autograd_keeps(kept, name: str) -> None:
    for measured, estimated in kept[name]:
        print(f"{name}: {measured:,} bytes measured, {estimated:,} estimated, {estimated / measured:.3f}")
        assert estimated == pytest.approx(measured, rel=ESTIMATE)


LONG = {"max_position_embeddings": 512}
SHARED = {
    "plain": (
        1,
        model(dense_config(), decoder=LONG),
        "fp32",
        SharedPrompts(groups=2, completions=8, prompt=39, completion=30),
    ),
    "bf16": (
        1,
        model(dense_config(), decoder=LONG),
        "bf16",
        SharedPrompts(groups=1, completions=8, prompt=99, completion=50),
    ),
    "two blocks of queries": (
        1,
        model(dense_config(), decoder=LONG),
        "fp32",
        SharedPrompts(groups=1, completions=2, prompt=150, completion=300),
    ),
    "LoRA": (
        1,
        model(dense_config(), decoder=LONG, **LORA),
        "fp32",
        SharedPrompts(groups=2, completions=8, prompt=39, completion=30),
    ),
    "selective recompute": (
        1,
        model(
            dense_config(),
            decoder=LONG | {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")},
        ),
        "fp32",
        SharedPrompts(groups=2, completions=8, prompt=60, completion=30),
    ),
    "tensor 2, sequence": (
        2,
        model(dense_config(), decoder=LONG, **SEQUENCE),
        "fp32",
        SharedPrompts(groups=2, completions=8, prompt=40, completion=30),
    ),
}


def test_planned_activations_with_shared_prompts_are_near_what_autograd_keeps() -> None:
    for name, (ranks, config, precision, shared) in SHARED.items():
        for measured, estimated in run_on_ranks(shared_activations, ranks, config, precision, shared):
            print(f"{name}: {measured:,} bytes measured, {estimated:,} estimated, {estimated / measured:.3f}")
            assert estimated == pytest.approx(measured, rel=ESTIMATE), name


def test_a_plan_counts_each_prompt_once_for_its_group() -> None:
    base = dense_config()
    found = {}
    for name, changes in {
        "a row each": {"shared_prompts": False, "micro_batch_size": 4},
        "shared": {"shared_prompts": True, "micro_batch_size": 4},
        "packed": {"shared_prompts": True, "packed_tokens": 47 + 2 * 16 + 47 + 16 + 15},
    }.items():
        config = run_config(base, ranks=1)
        config = replace(config, model=replace(config.model, **changes))
        (found[name],) = run_on_ranks(planned, 1, config, PlanConfig(sequence_tokens=64), VOCABULARY)
    assert found["a row each"].tokens_per_pass == 4 * 64
    assert found["shared"].tokens_per_pass == 2 * (47 + 2 * 16)
    assert found["packed"].tokens_per_pass == 47 + 2 * 16 + 47 + 16
    assert found["shared"].tokens_per_step == 4 * (47 + 2 * 16)
    assert found["shared"].stages[0].logits < found["a row each"].stages[0].logits


def test_a_layout_that_does_not_fit_is_refused_with_what_to_change() -> None:
    config = run_config(dense_config(), ranks=1)
    (plan,) = run_on_ranks(planned, 1, config, PlanConfig(), VOCABULARY)
    assert too_large(plan, PlanConfig(gpu_memory_gb=80, reserved_gb=6)) is None
    problem = too_large(plan, PlanConfig(gpu_memory_gb=plan.stages[0].peak / 1e9, reserved_gb=0.001))
    assert problem is not None
    assert "plan.gpu_memory_gb=" in problem
    assert ": change " in problem


def test_the_cache_has_room_for_a_second_completion_where_prompts_wait() -> None:
    config = run_config(dense_config(), ranks=1)
    of_slots = {
        slots: (
            replace(config, rollout=replace(config.rollout, batch_size=slots)),
            PlanConfig(sequence_tokens=64),
            VOCABULARY,
        )
        for slots in (6, 8, 20)
    }
    (plans,) = run_on_ranks(of_each, 1, planned, of_slots)
    for slots, (rows, tokens) in {6: (6, 64 + 16), 8: (8, 64), 20: (8, 64)}.items():
        expected = kv_cache_bytes(config.model, rows=rows, tokens=tokens, width=4)
        assert plans[slots].stages[0].kv_cache == expected


def test_the_table_has_a_column_for_each_stage_and_its_peak() -> None:
    config = run_config(model(dense_config(), **PIPELINE), ranks=2)
    (plan,) = run_on_ranks(planned, 1, config, PlanConfig(sequence_tokens=64), VOCABULARY)
    assert [stage.logits > 0 for stage in plan.stages] == [False, True]
    assert [stage.perception > 0 for stage in plan.stages] == [True, False]
    for stage in plan.stages:
        assert stage.peak >= stage.held + max(stage.activations + stage.logits, stage.kv_cache)
    lines = as_table(plan).splitlines()
    assert lines[0].split() == ["GB", "of", "one", "GPU", "stage", "0", "stage", "1"]
    assert "tokens per step (at most)  512" in lines
    assert plan.tokens_per_step == 4 * 2 * 64
