"""Checkpoints come back bit for bit, and a half-written one is never picked up."""

import pytest
import torch

from nemo_mapo.config.model import OptimizerConfig, SchedulerConfig
from nemo_mapo.testing.tiny import tiny_audio_llm, tiny_prompt_batch
from nemo_mapo.training.checkpoint import CheckpointStore, load_checkpoint
from nemo_mapo.training.optimizer import build_optimizer, clip_gradients

OPTIM = OptimizerConfig(lr=1e-2, weight_decay=0.1, sched=SchedulerConfig(warmup_steps=3))


def stepped(seed, steps):
    tiny = tiny_audio_llm(seed=seed)
    optimizer, scheduler = build_optimizer(tiny.model, OPTIM, total_steps=10)
    prompts = tiny_prompt_batch(tiny)
    for _ in range(steps):
        optimizer.zero_grad()
        tiny.model(prompts.tokens, prompts.audio, prompts.audio_row).logits.square().mean().backward()
        optimizer.step()
        scheduler.step()
    return tiny, optimizer


def assert_same_state(left, left_optimizer, right, right_optimizer):
    for name, value in left.model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, right.model.state_dict()[name]), name
    pairs = zip(left.model.parameters(), right.model.parameters(), strict=True)
    for parameter, other in pairs:
        for key, value in left_optimizer.state[parameter].items():
            assert torch.equal(value, right_optimizer.state[other][key]), key
    assert [g["lr"] for g in left_optimizer.param_groups] == [g["lr"] for g in right_optimizer.param_groups]


def test_weights_and_optimizer_come_back_bit_for_bit(tmp_path):
    tiny, optimizer = stepped(seed=0, steps=4)
    store = CheckpointStore(tmp_path, keep=2)
    store.save(4, tiny.model, optimizer, {"step": 4})
    other, other_optimizer = stepped(seed=1, steps=0)
    state = load_checkpoint(store.latest().path, other.model, optimizer=other_optimizer)
    assert state == {"step": 4}
    assert_same_state(tiny, optimizer, other, other_optimizer)


def test_only_the_newest_are_kept_and_unfinished_ones_are_ignored(tmp_path):
    tiny, optimizer = stepped(seed=0, steps=1)
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(step, tiny.model, optimizer, {"step": step})
    (tmp_path / "step_000004.unfinished").mkdir()
    assert store.latest().state == {"step": 3}
    assert sorted(path.name for path in tmp_path.glob("step_??????")) == ["step_000002", "step_000003"]


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a complete nemo-mapo checkpoint"):
        load_checkpoint(tmp_path, tiny_audio_llm().model)


def test_a_gradient_that_is_not_finite_names_its_parameter():
    tiny = tiny_audio_llm()
    weight = tiny.model.perception.projection[1].weight
    for parameter in tiny.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weight.grad[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"step 7: the gradient of perception\.projection\.1\.weight"):
        clip_gradients(tiny.model, 1.0, step=7)


def test_the_schedule_warms_up_linearly_then_stays_or_falls_as_a_cosine():
    tiny = tiny_audio_llm()
    constant, schedule = build_optimizer(tiny.model, OPTIM, total_steps=10)
    rates = []
    for _ in range(5):
        rates.append(constant.param_groups[0]["lr"])
        constant.step()
        schedule.step()
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([1 / 3, 2 / 3, 1.0, 1.0, 1.0]) * 1e-2)
    cosine = OptimizerConfig(lr=1.0, sched=SchedulerConfig(name="cosine", warmup_steps=0, min_lr=0.1))
    optimizer, schedule = build_optimizer(tiny.model, cosine, total_steps=4)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == 1.0 and abs(rates[2] - 0.55) < 1e-6 and abs(rates[4] - 0.1) < 1e-6
