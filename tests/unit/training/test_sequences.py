"""Alignment: everything about y_t is read at the position that predicts it, from the first completion token on."""

import torch

from nemo_mapo.data.sequences import at_predicting_positions, next_tokens, select_rows, token_batch
from nemo_mapo.testing.tiny import tiny_audio_llm, tiny_rollouts
from nemo_mapo.training.signals import MicroBatching, token_signals, token_signals_in_parts
from nemo_mapo.types import AudioBatch, TokenBatch

PAD = 0


def test_a_row_is_prompt_then_completion_without_a_gap():
    tiny = tiny_audio_llm()
    rollouts = tiny_rollouts(tiny)
    sequences = token_batch(rollouts, pad_id=PAD)
    for row in range(4):
        prompt = rollouts.prompts.tokens[row // 2, : int(rollouts.prompts.lengths[row // 2])]
        completion = rollouts.completions[row, : row + 1]
        whole = torch.cat([prompt, completion])
        assert sequences.tokens[row, : len(whole)].tolist() == whole.tolist()
        assert (sequences.tokens[row, len(whole) :] == PAD).all()
    assert sequences.audio_row.tolist() == [0, 0, 1, 1]


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
    sequences = token_batch(tiny_rollouts(tiny), pad_id=PAD)
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
    sequences = token_batch(tiny_rollouts(tiny), pad_id=PAD)
    signals = token_signals(tiny.model, sequences, head_reduction=None)
    signals.log_probs[:, 0].sum().backward()
    assert tiny.model.perception.projection[1].weight.grad.abs().max() > 0


def test_rows_taken_apart_give_what_the_whole_batch_gives():
    tiny = tiny_audio_llm()
    tiny.model.eval()
    sequences = token_batch(tiny_rollouts(tiny), pad_id=PAD)
    whole = token_signals(tiny.model, sequences, head_reduction="max")
    parts = token_signals_in_parts(tiny.model, sequences, head_reduction="max", batching=MicroBatching(rows=3))
    torch.testing.assert_close(parts.log_probs, whole.log_probs.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(parts.audio_mass, whole.audio_mass.detach(), atol=1e-5, rtol=0)


def test_selected_rows_carry_only_their_own_clips():
    sequences = token_batch(tiny_rollouts(tiny_audio_llm()), pad_id=PAD)
    last = select_rows(sequences, slice(3, 4))
    assert last.audio.waveforms.shape[0] == 1
    assert last.audio_row.tolist() == [0]
    assert torch.equal(last.audio.waveforms[0], sequences.audio.waveforms[1])
