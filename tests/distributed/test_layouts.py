"""In every layout a MAPO step has the loss, the metrics and the gradient of the plain run."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from torch import Tensor

from nemo_mapo.config.adapters import LoraConfig
from nemo_mapo.config.model import ModelConfig
from nemo_mapo.rows import ScoredRow
from support.layouts import (
    OBJECTIVE,
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
EXACT = 1e-6
"""Between two ways to one number in the same layout."""
TENSOR_2 = {"tensor_model_parallel_size": 2}
SEQUENCE = {"sequence_parallel": True}
STAGES_2 = {"pipeline_model_parallel_size": 2}
EXPERTS_2 = {"expert_model_parallel_size": 2}
PACKED = {"packed_tokens": 90}
SHARED = {"shared_prompts": True}
EVERY_TERM = replace(OBJECTIVE, surrogate="cispo", entropy_weight=0.01, ratio="token")

DENSE = [
    Layout(name="micro-batches of 2", rows=2),
    Layout(name="packed rows (THD)", model=PACKED),
    Layout(name="shared prompts", model=SHARED),
    Layout(name="shared prompts, micro-batches of 3", model=SHARED, rows=3),
    Layout(name="shared prompts, packed", model=SHARED | PACKED),
    Layout(name="shared prompts, full recompute", model=SHARED, decoder={"recompute_granularity": "full"}),
    Layout(
        name="shared prompts, selective recompute",
        model=SHARED,
        decoder={"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp", "layernorm")},
    ),
    Layout(
        name="shared prompts, tensor 2 x pipeline 2, sequence",
        ranks=4,
        model=SHARED | TENSOR_2 | SEQUENCE | STAGES_2,
        rows=4,
    ),
    Layout(name="shared prompts, data 2", ranks=2, model=SHARED, rows=2),
    Layout(name="full recompute", decoder={"recompute_granularity": "full"}),
    Layout(
        name="selective recompute",
        decoder={
            "recompute_granularity": "selective",
            "recompute_modules": ("core_attn", "mlp", "layernorm"),
        },
    ),
    Layout(name="tensor 2", ranks=2, model=TENSOR_2),
    Layout(name="tensor 4", ranks=4, model={"tensor_model_parallel_size": 4}, rows=4),
    Layout(name="tensor 2, sequence", ranks=2, model=TENSOR_2 | SEQUENCE, rows=2),
    Layout(name="tensor 2, sequence, packed", ranks=2, model=TENSOR_2 | SEQUENCE | PACKED),
    Layout(name="tensor 2, full recompute", ranks=2, model=TENSOR_2, decoder={"recompute_granularity": "full"}),
    Layout(name="pipeline 2", ranks=2, model=STAGES_2, rows=2),
    Layout(name="pipeline 2, packed", ranks=2, model=STAGES_2 | PACKED),
    Layout(
        name="pipeline 2, full recompute",
        ranks=2,
        model=STAGES_2,
        decoder={"recompute_granularity": "full"},
        rows=2,
    ),
    Layout(name="data 2", ranks=2, rows=2),
    Layout(name="data 2, packed", ranks=2, model=PACKED),
    Layout(name="tensor 2 x pipeline 2, sequence", ranks=4, model=TENSOR_2 | SEQUENCE | STAGES_2, rows=4),
    Layout(name="tensor 2 x data 2, sequence", ranks=4, model=TENSOR_2 | SEQUENCE, rows=4),
]
EXPERTS = [
    Layout(name="experts, data 2", ranks=2, rows=4),
    Layout(name="expert 2", ranks=2, model=EXPERTS_2, rows=4),
    Layout(name="experts, tensor 2, sequence", ranks=2, model=TENSOR_2 | SEQUENCE, rows=4),
    Layout(name="experts, pipeline 2", ranks=2, model=STAGES_2, rows=4),
    Layout(
        name="experts, selective recompute",
        decoder={"recompute_granularity": "selective", "recompute_modules": ("moe", "layernorm")},
        rows=4,
    ),
]


ADAPTERS = [
    Layout(name="adapters, tensor 2", ranks=2, model=TENSOR_2),
    Layout(name="adapters, tensor 2, sequence, packed", ranks=2, model=TENSOR_2 | SEQUENCE | PACKED),
    Layout(name="adapters, pipeline 2", ranks=2, model=STAGES_2, rows=4),
    Layout(name="adapters, data 2", ranks=2, rows=4),
    Layout(name="adapters, shared prompts, tensor 2", ranks=2, model=TENSOR_2 | SHARED),
    Layout(name="adapters, full recompute", decoder={"recompute_granularity": "full"}),
]


ON_POLICY = [
    Layout(name="padded, micro-batches of 3", rows=3),
    Layout(name="packed", model=PACKED),
    Layout(name="shared prompts, micro-batches of 3", model=SHARED, rows=3),
    Layout(
        name="shared prompts, packed, full recompute", model=SHARED | PACKED, decoder={"recompute_granularity": "full"}
    ),
    Layout(
        name="shared prompts, tensor 2 x pipeline 2", ranks=4, model=SHARED | TENSOR_2 | SEQUENCE | STAGES_2, rows=4
    ),
    Layout(name="data 2, every term", ranks=2, rows=2, objective=EVERY_TERM),
]


@dataclass(frozen=True)
class Start:
    """A checkpoint, rollouts, and what the plain run makes of them."""

    config: ModelConfig
    path: str
    batch: list[ScoredRow]
    plain: Outcome
    gradients: dict[str, Tensor]


def prepare(folder: Path, config: ModelConfig, plain: Layout) -> Start:
    path = str(folder / "start")
    (batch,) = run_on_ranks(write_start, 1, path, config)
    outcome, gradients = outcome_of(folder, plain, config, path, batch)
    return Start(config=config, path=path, batch=batch, plain=outcome[0], gradients=gradients)


def outcome_of(
    folder: Path, layout: Layout, config: ModelConfig, path: str, batch: list[ScoredRow]
) -> tuple[list[Outcome], dict[str, Tensor]]:
    saved = str(folder / layout.name.replace(" ", "_"))
    outcomes = run_on_ranks(one_step, layout.ranks, layout, config, path, saved, batch)
    return outcomes, whole_gradients(config, saved)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return prepare(tmp_path_factory.mktemp("dense"), dense_config(), Layout())


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """The plain run has the same two micro-batches: the balancing loss is a mean over them."""
    config = moe_config(moe_aux_loss_coeff=0.1)
    return prepare(tmp_path_factory.mktemp("experts"), config, Layout(name="experts, plain", rows=4))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Start:
    config = replace(dense_config(), lora=LoraConfig(rank=4, alpha=8.0))
    return prepare(tmp_path_factory.mktemp("adapters"), config, Layout(name="adapters, plain"))


def largest_term(outcome: Outcome) -> float:
    """The loss is a sum of terms of both signs; it is as exact as its largest term, not as what is left of it."""
    return max(abs(outcome.metrics[f"train/{term}_loss"]) for term in ("policy", "kl", "attention"))


def check(start: Start, layout: Layout, tmp_path: Path, comparison: list[tuple[str, float, float, float]]) -> None:
    outcomes, gradients = outcome_of(tmp_path, layout, start.config, start.path, start.batch)
    terms = largest_term(start.plain)
    metrics = {
        name: max(
            relative_figure(outcome.metrics[name], value, terms if "loss" in name else 0.0) for outcome in outcomes
        )
        for name, value in start.plain.metrics.items()
    }
    differences = {name: relative(gradients[name], expected) for name, expected in start.gradients.items()}
    loss = max(relative_figure(outcome.loss, start.plain.loss, terms) for outcome in outcomes)
    comparison.append((layout.name, loss, max(metrics.values()), max(differences.values())))
    assert loss <= TOLERANCE
    assert {name: value for name, value in metrics.items() if value > TOLERANCE} == {}
    assert {name: value for name, value in differences.items() if value > TOLERANCE} == {}
    for outcome in outcomes:
        assert outcome.metrics.keys() == start.plain.metrics.keys()
        assert relative_figure(outcome.grad_norm, start.plain.grad_norm, 0.0) <= TOLERANCE
        assert outcome.replicas_differ <= TOLERANCE * start.plain.grad_norm


@pytest.mark.parametrize("layout", DENSE, ids=lambda layout: layout.name)
def test_a_dense_decoder_in_this_layout_equals_the_plain_run(dense, layout, tmp_path, comparison) -> None:
    check(dense, layout, tmp_path, comparison)


@pytest.mark.parametrize("layout", EXPERTS, ids=lambda layout: layout.name)
def test_a_decoder_with_experts_in_this_layout_equals_the_plain_run(experts, layout, tmp_path, comparison) -> None:
    check(experts, layout, tmp_path, comparison)


@pytest.mark.parametrize("layout", ADAPTERS, ids=lambda layout: layout.name)
def test_adapters_in_this_layout_equal_those_of_the_plain_run(adapters, layout, tmp_path, comparison) -> None:
    trained = {name.rpartition(".")[2] for name in adapters.gradients if name.startswith("language_model")}
    assert trained == {"lora_a", "lora_b"}
    check(adapters, layout, tmp_path, comparison)


def test_experts_see_a_shared_prompt_once_and_compute_the_same(tmp_path, comparison) -> None:
    """Without the balancing loss, which is a mean over the tokens that are read."""
    start = prepare(tmp_path, moe_config(), Layout(name="experts, plain", rows=4))
    for ranks, model in ((1, SHARED), (2, SHARED | EXPERTS_2)):
        check(
            start,
            Layout(name=f"experts {ranks}, shared prompts", ranks=ranks, model=model, rows=4),
            tmp_path,
            comparison,
        )


@pytest.mark.parametrize("layout", ON_POLICY, ids=lambda layout: layout.name)
def test_a_first_step_without_an_old_policy_pass_equals_one_with_it(dense, layout, tmp_path) -> None:
    (read, gradients), (own, others) = (
        outcome_of(tmp_path / old, replace(layout, old=old), dense.config, dense.path, dense.batch)
        for old in ("read", "own")
    )
    for one, other in zip(read, own, strict=True):
        assert other.signals_differ <= EXACT
        assert other.loss == pytest.approx(one.loss, rel=EXACT, abs=EXACT)
        assert other.metrics == pytest.approx(one.metrics, rel=EXACT, abs=EXACT)
        assert other.metrics["train/ratio_max"] == 1.0
    assert {
        name: difference for name in gradients if (difference := relative(others[name], gradients[name])) > EXACT
    } == {}
    assert all(float(gradient.norm()) > 0 for gradient in gradients.values())


def test_every_term_of_the_loss_counts_in_the_comparison(dense) -> None:
    terms = ("train/policy_loss", "train/kl_loss", "train/attention_loss", "mapo/term_mask")
    assert all(abs(dense.plain.metrics[term]) > 1e-3 for term in terms)
    assert all(float(gradient.norm()) > 0 for gradient in dense.gradients.values())
    assert OBJECTIVE.eta > 0 and OBJECTIVE.beta > 0


def test_under_tensor_parallelism_the_largest_head_is_now_on_this_rank_now_on_the_other(dense, tmp_path) -> None:
    layout = Layout(name="tensor 2", ranks=2, model=TENSOR_2)
    outcomes, _ = outcome_of(tmp_path, layout, dense.config, dense.path, dense.batch)
    assert all(0.1 < outcome.winners < 0.9 for outcome in outcomes)
