"""Checkpoints come back bit for bit, and a half-written one is never picked up."""

import pytest
import torch

from nemo_mapo.config.model import OptimizerConfig
from nemo_mapo.testing.tiny import tiny_audio_llm, tiny_prompt_batch
from nemo_mapo.training.checkpoint import CheckpointStore, load_checkpoint
from nemo_mapo.training.optimizer import build_optimizer, wrap_data_parallel

OPTIM = OptimizerConfig(lr=1e-2, weight_decay=0.1)


def stepped(seed, steps):
    tiny = tiny_audio_llm(seed=seed)
    optimizer = build_optimizer(wrap_data_parallel(tiny.model), OPTIM)
    prompts = tiny_prompt_batch(tiny)
    for _ in range(steps):
        optimizer.zero_grad()
        tiny.model(prompts.tokens, prompts.audio, prompts.audio_row).logits.square().mean().backward()
        optimizer.step(lr=1e-2, max_norm=1.0)
    return tiny, optimizer


def assert_same_state(left, left_optimizer, right, right_optimizer):
    for name, value in left.model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, right.model.state_dict()[name]), name
    pairs = zip(left.model.parameters(), right.model.parameters(), strict=True)
    for parameter, other in pairs:
        for key, value in left_optimizer.adamw.state[parameter].items():
            assert torch.equal(value, right_optimizer.adamw.state[other][key]), key


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
