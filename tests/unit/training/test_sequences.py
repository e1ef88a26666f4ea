"""Alignment: everything about y_t is read at the position that predicts it, from the first completion token on."""

import torch

from nemo_mapo.data.sequences import (
    at_predicting_positions,
    audio_of,
    left_padded,
    next_tokens,
    rows_together,
    select_rows,
    token_batch,
)
from nemo_mapo.rows import Prompt
from nemo_mapo.training.signals import MicroBatching, token_signals, token_signals_in_parts
from nemo_mapo.types import AudioBatch, TokenBatch
from support.tiny import tiny_audio_llm, tiny_rows

PAD = 0


def test_a_row_is_prompt_then_completion_without_a_gap():
    rows = tiny_rows(tiny_audio_llm())
    sequences = token_batch(rows, pad_id=PAD)
    for tokens, row in zip(sequences.tokens, rows, strict=True):
        assert tokens[: len(row)].tolist() == [*row.prompt.token_ids.tolist(), *row.token_ids.tolist()]
        assert (tokens[len(row) :] == PAD).all()
    assert sequences.audio_row.tolist() == [0, 0, 1, 1]


def test_a_clip_that_several_prompts_are_about_is_there_once_and_prompts_may_have_several():
    first, second = torch.ones(3), torch.ones(2)
    prompts = [
        Prompt(id=name, token_ids=torch.tensor([1]), clips=clips)
        for name, clips in (("a", (first,)), ("b", (second, first)), ("c", ()), ("d", (first,)))
    ]
    audio, audio_row = audio_of(prompts)
    assert audio.lengths.tolist() == [3, 2] and audio.waveforms.tolist() == [[1.0] * 3, [1.0, 1.0, 0.0]]
    assert audio_row.tolist() == [[0, -1], [1, 0], [-1, -1], [0, -1]]
    assert audio_of(prompts[2:])[1].tolist() == [-1, 0], "one clip at most needs one column"


def test_prompts_are_padded_on_the_left_for_generation():
    prompts = [Prompt(id="a", token_ids=torch.tensor([5, 6, 7])), Prompt(id="b", token_ids=torch.tensor([8]))]
    tokens, segment_ids = left_padded(prompts, pad_id=PAD)
    assert tokens.tolist() == [[5, 6, 7], [PAD, PAD, 8]]
    assert segment_ids.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_values_are_read_one_position_before_their_token():
    sequences = TokenBatch(
        tokens=torch.zeros(2, 6, dtype=torch.int64),
        prompt_lengths=torch.tensor([2, 3]),
        completion_lengths=torch.tensor([3, 1]),
        audio=AudioBatch(waveforms=torch.zeros(0, 0), lengths=torch.zeros(0, dtype=torch.int64)),
        audio_row=torch.tensor([-1, -1]),
    )
    positions = torch.arange(6.0).expand(2, 6)
    assert at_predicting_positions(positions, sequences).tolist() == [[1.0, 2.0, 3.0], [2.0, 0.0, 0.0]]


def test_next_tokens_are_the_targets_of_their_positions():
    assert next_tokens(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, 7]]


def test_log_probabilities_and_entropies_match_a_plain_softmax_token_by_token():
    tiny = tiny_audio_llm()
    sequences = token_batch(tiny_rows(tiny), pad_id=PAD)
    signals = token_signals(tiny.model, sequences, head_reduction="max")
    logits = tiny.model(sequences.tokens, sequences.audio, sequences.audio_row).logits
    distribution = logits.log_softmax(-1)
    for row in range(4):
        prompt = int(sequences.prompt_lengths[row])
        for t in range(int(sequences.completion_lengths[row])):
            predicted = distribution[row, prompt + t - 1]
            token = int(sequences.tokens[row, prompt + t])
            torch.testing.assert_close(signals.log_probs[row, t], predicted[token], atol=1e-5, rtol=1e-5)
            entropy = -(predicted.exp() * predicted).sum()
            torch.testing.assert_close(signals.entropy_nats[row, t], entropy, atol=1e-5, rtol=1e-5)


def test_the_first_completion_token_is_trained():
    tiny = tiny_audio_llm()
    sequences = token_batch(tiny_rows(tiny), pad_id=PAD)
    signals = token_signals(tiny.model, sequences, head_reduction=None)
    signals.log_probs[:, 0].sum().backward()
    assert tiny.model.perception.projection[1].weight.grad.abs().max() > 0


def test_rows_taken_apart_give_what_the_whole_batch_gives():
    tiny = tiny_audio_llm()
    tiny.model.eval()
    sequences = token_batch(tiny_rows(tiny), pad_id=PAD)
    whole = token_signals(tiny.model, sequences, head_reduction="max")
    parts = token_signals_in_parts(tiny.model, sequences, head_reduction="max", batching=MicroBatching(rows=3))
    torch.testing.assert_close(parts.log_probs, whole.log_probs.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(parts.audio_mass, whole.audio_mass.detach(), atol=1e-5, rtol=0)


def test_selected_rows_carry_only_their_own_clips():
    sequences = token_batch(tiny_rows(tiny_audio_llm()), pad_id=PAD)
    last = select_rows(sequences, slice(3, 4))
    assert last.audio.waveforms.shape[0] == 1
    assert last.audio_row.tolist() == [0]
    assert torch.equal(last.audio.waveforms[0], sequences.audio.waveforms[1])


def test_values_of_some_rows_each_are_put_together_in_the_order_of_the_batch():
    parts = [([2, 0], torch.tensor([[[5.0, 6.0], [1.0, 2.0]]])), (slice(1, 2), torch.tensor([[[7.0, 8.0, 9.0]]]))]
    assert rows_together(parts, 3).tolist() == [[[1.0, 2.0, 0.0], [7.0, 8.0, 9.0], [5.0, 6.0, 0.0]]]
