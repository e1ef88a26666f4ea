"""The loss of targets: its value by hand, its gradient however the rows go through the model, what it leaves out."""

import pytest
import torch

from nemo_mapo.data.sequences import hide_clips, select_rows, token_batch
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.training.optimizer import gradient_of, trainable_parameters, wrap_data_parallel
from nemo_mapo.training.signals import MicroBatching
from nemo_mapo.training.supervised import mean_negative_log_likelihood, supervised_gradient
from nemo_mapo.types import TokenBatch
from support.tiny import tiny_audio_llm, tiny_rows

WHOLE = MicroBatching(rows=4)


def batch(tiny):
    """Four rows whose targets have 1, 2, 3 and 4 tokens."""
    return token_batch(tiny_rows(tiny), pad_id=SpecialTokens.from_tokenizer(tiny.tokenizer).pad_id)


def gradient(tiny, sequences, batching):
    wrapped = wrap_data_parallel(tiny.model)
    wrapped.zero_grad_buffer()
    figures = supervised_gradient(wrapped, sequences, batching)
    return figures, {name: gradient_of(weight).clone() for name, weight in trainable_parameters(tiny.model)}


def by_hand(tiny, sequences):
    """Mean of -log softmax at the position before each target token, row by row, from the model's logits."""
    losses = []
    for row in range(len(sequences.prompt_lengths)):
        alone = select_rows(sequences, [row])
        logits = tiny.model(alone.tokens, alone.audio, alone.audio_row).logits[0].double()
        prompt, target = int(alone.prompt_lengths), int(alone.completion_lengths)
        for place in range(prompt, prompt + target):
            losses.append(-torch.log_softmax(logits[place - 1], dim=-1)[alone.tokens[0, place]])
    return torch.stack(losses)


def test_the_loss_is_the_mean_over_target_tokens_and_over_nothing_else():
    tiny = tiny_audio_llm()
    sequences = batch(tiny)
    losses = by_hand(tiny, sequences)
    figures, _ = gradient(tiny, sequences, WHOLE)
    assert len(losses) == 1 + 2 + 3 + 4 and figures["train/target_tokens"] == 10
    assert figures["train/loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    parts = [select_rows(sequences, [0]), select_rows(sequences, [1, 2, 3])]
    assert mean_negative_log_likelihood(tiny.model, parts, WHOLE) == pytest.approx(losses.mean().item(), rel=1e-5)


def test_the_gradient_is_that_of_the_loss_by_hand():
    tiny = tiny_audio_llm()
    sequences = batch(tiny)
    by_hand(tiny, sequences).mean().backward()
    expected = {name: weight.grad.clone() for name, weight in trainable_parameters(tiny.model)}
    other = tiny_audio_llm()
    _, found = gradient(other, sequences, WHOLE)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    "batching", [MicroBatching(rows=1), MicroBatching(rows=3), MicroBatching(rows=4, packed_tokens=64)]
)
def test_micro_batches_and_packing_change_neither_loss_nor_gradient(batching):
    tiny, other = tiny_audio_llm(), tiny_audio_llm()
    sequences = batch(tiny)
    figures, whole = gradient(tiny, sequences, WHOLE)
    in_parts, found = gradient(other, sequences, batching)
    assert in_parts["train/loss"] == pytest.approx(figures["train/loss"], rel=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-6, msg=name)


def test_another_pad_token_changes_nothing():
    tiny, other = tiny_audio_llm(), tiny_audio_llm()
    sequences = batch(tiny)
    lengths = sequences.prompt_lengths + sequences.completion_lengths
    padding = torch.arange(sequences.tokens.shape[1]) >= lengths[:, None]
    assert padding.any()
    repadded = TokenBatch(**{**vars(sequences), "tokens": sequences.tokens.masked_fill(padding, 20)})
    before, after = gradient(tiny, sequences, WHOLE), gradient(other, repadded, WHOLE)
    assert before[0] == after[0]
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


def test_hidden_clips_leave_prompt_and_target_as_the_text_only_reference_reads_them():
    tiny = tiny_audio_llm()
    special = SpecialTokens.from_tokenizer(tiny.tokenizer)
    sequences = batch(tiny)
    # Two rows share a clip here; give each its own.
    sequences = TokenBatch(**{**vars(sequences), "audio": sequences.audio.select(sequences.audio_row)})
    sequences = TokenBatch(**{**vars(sequences), "audio_row": torch.arange(4)})
    text_only, silent = torch.tensor([True, False, False, False]), torch.tensor([False, True, False, False])
    hidden = hide_clips(sequences, special, text_only=text_only, silent=silent)
    assert hidden.audio_row.tolist() == [-1, 1, 2, 3]
    assert not (hidden.tokens[0] == special.audio_id).any()
    assert hidden.audio.waveforms[1].abs().max() == 0 and hidden.audio.waveforms[2].abs().max() > 0
    assert torch.equal(hidden.completion_lengths, sequences.completion_lengths)
    start, end = int(hidden.prompt_lengths[0]), int(hidden.prompt_lengths[0] + hidden.completion_lengths[0])
    whole = int(sequences.prompt_lengths[0])
    assert torch.equal(hidden.tokens[0, start:end], sequences.tokens[0, whole : whole + end - start])
    assert sequences.audio.waveforms[1].abs().max() > 0, "the batch that was given is left as it was"
