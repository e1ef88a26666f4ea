"""The loss of targets: its value by hand, its gradient however the rows go through the model, what it leaves out."""

import pytest
import torch

from nemo_mapo.config.data import TargetConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import PADDED_ROWS, MicroBatching
from nemo_mapo.training.optimizer import gradient_of, trainable_parameters, wrap_data_parallel
from nemo_mapo.training.supervised import mean_negative_log_likelihood, supervised_gradient
from nemo_mapo.training.targets import hide_clips
from support.tiny import tiny_audio_llm, tiny_rows

WHOLE = MicroBatching(rows=4)


def gradient(tiny, rows, batching):
    wrapped = wrap_data_parallel(tiny.model)
    wrapped.zero_grad_buffer()
    figures = supervised_gradient(wrapped, rows, batching)
    return figures, {name: gradient_of(weight).clone() for name, weight in trainable_parameters(tiny.model)}


def by_hand(tiny, rows):
    """Mean of -log softmax at the position before each target token, row by row, from the model's logits."""
    losses = []
    for row in rows:
        logits = PADDED_ROWS.lay_out([row], tiny.model).call(tiny.model, None).logits[0].double()
        for number, token in enumerate(row.token_ids):
            losses.append(-torch.log_softmax(logits[len(row.prompt) + number - 1], dim=-1)[token])
    return torch.stack(losses)


def test_the_loss_is_the_mean_over_target_tokens_and_over_nothing_else():
    tiny = tiny_audio_llm()
    rows = tiny_rows(tiny)
    losses = by_hand(tiny, rows)
    figures, _ = gradient(tiny, rows, WHOLE)
    assert len(losses) == 1 + 2 + 3 + 4 and figures["train/target_tokens"] == 10
    assert figures["train/loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    parts = [rows[:1], rows[1:]]
    assert mean_negative_log_likelihood(tiny.model, parts, WHOLE) == pytest.approx(losses.mean().item(), rel=1e-5)


def test_the_gradient_is_that_of_the_loss_by_hand():
    tiny = tiny_audio_llm()
    rows = tiny_rows(tiny)
    by_hand(tiny, rows).mean().backward()
    expected = {name: weight.grad.clone() for name, weight in trainable_parameters(tiny.model)}
    other = tiny_audio_llm()
    _, found = gradient(other, rows, WHOLE)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    "batching", [MicroBatching(rows=1), MicroBatching(rows=3), MicroBatching(rows=4, packed_tokens=64)]
)
def test_micro_batches_and_packing_change_neither_loss_nor_gradient(batching):
    tiny, other = tiny_audio_llm(), tiny_audio_llm()
    rows = tiny_rows(tiny)
    figures, whole = gradient(tiny, rows, WHOLE)
    in_parts, found = gradient(other, rows, batching)
    assert in_parts["train/loss"] == pytest.approx(figures["train/loss"], rel=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-6, msg=name)


def test_another_token_in_the_padding_changes_nothing(monkeypatch):
    tiny, other = tiny_audio_llm(), tiny_audio_llm()
    rows = tiny_rows(tiny)
    assert len(set(map(len, rows))) > 1, "there is padding"
    before = gradient(tiny, rows, WHOLE)
    monkeypatch.setattr(AudioLLM, "fill_id", 20)
    after = gradient(other, rows, WHOLE)
    assert before[0] == after[0]
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


def test_hidden_clips_leave_prompt_and_target_as_the_text_only_reference_reads_them():
    tiny = tiny_audio_llm()
    special = SpecialTokens.from_tokenizer(tiny.tokenizer)
    rows = tiny_rows(tiny)
    assert rows[0].prompt.clips[0] is rows[1].prompt.clips[0], "two rows about one clip"
    shares = TargetConfig(text_only_share=1 / 8, silent_clip_share=2 / 8)
    hidden = hide_clips(rows, [0, 3, 2, 5], 8, shares, special)
    assert hidden[0].prompt.clips == () and not (hidden[0].prompt.token_ids == special.audio_id).any()
    assert [bool(row.prompt.clips[0].any()) for row in hidden[1:]] == [True, False, True]
    assert all(row.token_ids is whole.token_ids for row, whole in zip(hidden, rows, strict=True))
    assert all(row.prompt.clips[0].any() for row in rows), "the rows that were given are left as they were"
