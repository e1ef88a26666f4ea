"""Clipped AdamW steps on float32 main weights, steps that are refused, and the learning rate."""

import math

import pytest
import torch

from nemo_mapo.config.model import OptimizerConfig, SchedulerConfig
from nemo_mapo.training.optimizer import (
    OptimizerStep,
    SkippedSteps,
    build_optimizer,
    global_gradient_norm,
    learning_rate,
    trainable_parameters,
    wrap_data_parallel,
)
from support.tiny import tiny_audio_llm, tiny_batch

OPTIM = OptimizerConfig(lr=1e-2, weight_decay=0.1)


def with_gradient(dtype=torch.float32):
    """A model with the gradient of some loss in its buffers, and its optimiser."""
    tiny = tiny_audio_llm(dtype=dtype)
    optimizer = build_optimizer(wrap_data_parallel(tiny.model), OPTIM)
    optimizer.zero_grad()
    prompts = tiny_batch(tiny)
    tiny.model(prompts.tokens, prompts.audio, prompts.audio_row).logits.float().square().mean().backward()
    return tiny.model, optimizer


def test_a_step_is_that_of_torchs_adamw_on_clipped_gradients():
    model, optimizer = with_gradient()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients.values()]))
    taken = optimizer.step(lr=1e-2, max_norm=0.5 * float(norm))
    assert taken.fault is None and taken.grad_norm == pytest.approx(float(norm), rel=1e-5)
    name = "language_model.decoder.layers.0.mlp.linear_fc1.weight"
    weight = torch.nn.Parameter(before[name])
    weight.grad = gradients[name] * (0.5 * norm / (norm + 1e-6))
    torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1, betas=OPTIM.betas, eps=OPTIM.eps).step()
    torch.testing.assert_close(model.get_parameter(name), weight)


def test_vectors_do_not_decay():
    model, optimizer = with_gradient()
    optimizer.zero_grad()
    norm = model.get_parameter("language_model.decoder.final_layernorm.weight")
    matrix = model.get_parameter("language_model.decoder.layers.0.mlp.linear_fc1.weight")
    before = norm.detach().clone(), matrix.detach().clone()
    optimizer.step(lr=1e-2, max_norm=1.0)
    assert torch.equal(norm, before[0])
    torch.testing.assert_close(matrix, before[1] * (1 - 1e-2 * 0.1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_named(bad):
    model, optimizer = with_gradient()
    model.perception.projection[1].weight.main_grad[0, 0] = bad
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    taken = optimizer.step(lr=1e-2, max_norm=1.0)
    assert taken.fault == "perception.projection.1.weight"
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not optimizer.adamw.state


def test_steps_that_are_skipped_in_a_row_end_the_run_naming_the_tensor():
    bad, good = OptimizerStep(grad_norm=math.nan, fault="some.weight"), OptimizerStep(grad_norm=1.0, fault=None)
    skipped = SkippedSteps(limit=3, key="trainer.sft.max_skipped_steps")
    for taken in (bad, bad, good, bad, bad):
        skipped.count(taken, math.nan, step=7)
    assert skipped.in_a_row == 2
    with pytest.raises(
        FloatingPointError, match=r"step 7: 3 updates in a row .* first bad tensor being some\.weight"
    ) as said:
        skipped.count(bad, math.nan, step=7)
    assert "or raise trainer.sft.max_skipped_steps" in str(said.value)


def test_updates_too_small_for_bfloat16_add_up_in_the_main_weights():
    model, optimizer = with_gradient(torch.bfloat16)
    name = "language_model.decoder.layers.0.mlp.linear_fc1.weight"
    weight = model.get_parameter(name)
    start = weight.detach().clone()
    gradient = weight.main_grad.clone()
    moved_after = []
    for _ in range(40):
        # Far below half a unit in the last place of most weights.
        optimizer.step(lr=2e-5, max_norm=1e9)
        weight.main_grad.copy_(gradient)
        moved_after.append(float((weight != start).float().mean()))
    assert weight.dtype == torch.bfloat16 and optimizer.main[name].dtype == torch.float32
    assert moved_after[0] < 0.2 < 0.5 < moved_after[-1]
    torch.testing.assert_close(optimizer.main[name].detach(), weight.detach().float(), atol=0.0, rtol=2**-8)


def test_the_global_norm_counts_every_weight_once():
    model, _ = with_gradient()
    parameters = dict(trainable_parameters(model))
    for parameter in parameters.values():
        parameter.main_grad.fill_(1.0)
    count = sum(parameter.numel() for parameter in parameters.values())
    assert float(global_gradient_norm(parameters)) == pytest.approx(count**0.5, rel=1e-5)


def test_the_schedule_warms_up_linearly_then_stays_or_falls_as_a_cosine():
    constant = OptimizerConfig(lr=1e-2, sched=SchedulerConfig(warmup_steps=3))
    rates = [learning_rate(constant, step, 10) for step in range(5)]
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 1e-2])
    cosine = OptimizerConfig(lr=1.0, sched=SchedulerConfig(name="cosine", warmup_steps=0, min_lr=0.1))
    assert [learning_rate(cosine, step, 4) for step in (0, 2, 4, 9)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
