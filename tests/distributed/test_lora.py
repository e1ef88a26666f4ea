"""Adapters of a split decoder: a training step, their checkpoint and the base behind them equal one process's."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed.lora_ranks import base_and_merged, save_again, save_fresh, whole_adapters
from torch import Tensor

from nemo_mapo.config.adapters import LoraConfig
from nemo_mapo.config.model import ModelConfig
from nemo_mapo.models.lora import is_adapter
from nemo_mapo.rows import ScoredRow
from support.layouts import (
    Layout,
    Outcome,
    dense_config,
    moe_config,
    one_step,
    relative,
    relative_figure,
    whole_gradients,
    write_start,
)
from support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
# A rank that the ranks of a layout could not share out.
CONFIG = replace(dense_config(), lora=LoraConfig(rank=3, alpha=6.0))
ADAPTERS = 4 * 4 * 2
"""Four layers, four projections, A and B."""
FULL = {"recompute_granularity": "full"}
TENSOR_2 = Layout(name="tensor 2", ranks=2, model={"tensor_model_parallel_size": 2}, rows=4)
SEQUENCE = Layout(
    name="tensor 2, sequence",
    ranks=2,
    model={"tensor_model_parallel_size": 2, "sequence_parallel": True},
    rows=4,
)
PIPELINE_2 = Layout(name="pipeline 2", ranks=2, model={"pipeline_model_parallel_size": 2})


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[ScoredRow]]:
    path = str(tmp_path_factory.mktemp("lora") / "start")
    (batch,) = run_on_ranks(write_start, 1, path, CONFIG)
    return path, batch


def step(
    folder: Path, layout: Layout, start: tuple[str, list[ScoredRow]], config: ModelConfig = CONFIG
) -> tuple[list[Outcome], dict[str, Tensor]]:
    saved = str(folder / "gradients")
    outcomes = run_on_ranks(one_step, layout.ranks, layout, config, start[0], saved, start[1])
    (gradients,) = run_on_ranks(whole_gradients, 1, config, saved)
    return outcomes, gradients


@pytest.fixture(scope="module")
def plain(
    start: tuple[str, list[ScoredRow]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Outcome, dict[str, Tensor]]:
    (outcome,), gradients = step(tmp_path_factory.mktemp("plain"), Layout(), start)
    return outcome, gradients


def test_adapters_and_perception_have_a_gradient_and_the_decoder_has_none(plain) -> None:
    _, gradients = plain
    assert all(float(gradient.norm()) > 0 for gradient in gradients.values())
    assert sum(is_adapter(name) for name in gradients) == ADAPTERS
    assert all(is_adapter(name) or name.startswith("perception.") for name in gradients)


@pytest.mark.parametrize(
    "layout",
    [TENSOR_2, SEQUENCE, replace(SEQUENCE, name="tensor 2, sequence, full recompute", decoder=FULL)],
    ids=lambda layout: layout.name,
)
def test_a_step_of_the_adapters_in_this_layout_equals_the_plain_run(start, plain, layout, tmp_path) -> None:
    expected, expected_gradients = plain
    outcomes, gradients = step(tmp_path, layout, start)
    differences = {name: relative(gradients[name], value) for name, value in expected_gradients.items()}
    assert {name: value for name, value in differences.items() if value > TOLERANCE} == {}
    for outcome in outcomes:
        assert relative_figure(outcome.loss, expected.loss, 1.0) <= TOLERANCE
        assert relative_figure(outcome.grad_norm, expected.grad_norm, 0.0) <= TOLERANCE
        assert outcome.replicas_differ <= TOLERANCE * expected.grad_norm


EXPERTS = replace(moe_config(), lora=LoraConfig(rank=3, alpha=6.0))
EXPERT_2 = Layout(name="expert 2", ranks=2, model={"expert_model_parallel_size": 2}, rows=4)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, list[ScoredRow]], Outcome, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("experts")
    (batch,) = run_on_ranks(write_start, 1, str(folder / "start"), EXPERTS)
    start = (str(folder / "start"), batch)
    (outcome,), gradients = step(folder, Layout(name="experts, plain", rows=4), start, EXPERTS)
    return start, outcome, gradients


@pytest.mark.parametrize("layout", [EXPERT_2, SEQUENCE], ids=lambda layout: layout.name)
def test_a_step_of_the_experts_adapters_in_this_layout_equals_the_plain_run(experts, layout, tmp_path) -> None:
    start, expected, expected_gradients = experts
    assert sum(is_adapter(name) for name in expected_gradients) == 4 * 2 * (2 + 4 * 2)
    outcomes, gradients = step(tmp_path, layout, start, EXPERTS)
    differences = {name: relative(gradients[name], value) for name, value in expected_gradients.items()}
    assert {name: value for name, value in differences.items() if value > TOLERANCE} == {}
    for outcome in outcomes:
        assert relative_figure(outcome.grad_norm, expected.grad_norm, 0.0) <= TOLERANCE
        assert outcome.replicas_differ <= TOLERANCE * expected.grad_norm


def test_experts_of_two_ranks_start_with_the_adapters_of_one_process(tmp_path) -> None:
    run_on_ranks(save_fresh, 1, Layout(), EXPERTS, str(tmp_path / "plain"))
    run_on_ranks(save_fresh, 2, EXPERT_2, EXPERTS, str(tmp_path / "split"))
    found, wanted = (run_on_ranks(whole_adapters, 1, EXPERTS, str(tmp_path / name))[0] for name in ("split", "plain"))
    assert_equal(found, wanted)


@pytest.mark.parametrize("layout", [TENSOR_2, SEQUENCE], ids=lambda layout: layout.name)
def test_on_every_rank_adapters_off_is_the_base_and_the_merged_state_is_the_policy(start, layout) -> None:
    for is_base, merged, moved in run_on_ranks(base_and_merged, layout.ranks, layout, CONFIG, start[0]):
        assert is_base
        assert merged <= TOLERANCE
        assert moved > 100 * TOLERANCE


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    path = str(tmp_path_factory.mktemp("fresh") / "plain")
    run_on_ranks(save_fresh, 1, Layout(), CONFIG, path)
    return adapters_in(path)


def adapters_in(checkpoint: str) -> dict[str, Tensor]:
    (adapters,) = run_on_ranks(whole_adapters, 1, CONFIG, checkpoint)
    assert len(adapters) == ADAPTERS
    return adapters


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("layout", [TENSOR_2, PIPELINE_2], ids=lambda layout: layout.name)
def test_fresh_adapters_are_the_same_in_every_layout(fresh, layout, tmp_path) -> None:
    run_on_ranks(save_fresh, layout.ranks, layout, CONFIG, str(tmp_path / "split"))
    assert_equal(adapters_in(str(tmp_path / "split")), fresh)


def test_what_two_ranks_save_one_process_loads(start: tuple[str, list[ScoredRow]], tmp_path: Path) -> None:
    run_on_ranks(save_again, 2, TENSOR_2, CONFIG, start[0], str(tmp_path / "again"))
    assert_equal(adapters_in(str(tmp_path / "again")), adapters_in(start[0]))
