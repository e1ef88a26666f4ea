"""The audio LLM: audio goes exactly where its placeholders are, and padding changes nothing."""

from dataclasses import replace

import pytest
import torch

from nemo_mapo.models.layout import audio_of
from nemo_mapo.types import AudioBatch
from support.tiny import tiny_audio_llm, tiny_batch, tiny_prompts

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tiny():
    built = tiny_audio_llm()
    built.model.eval()
    return built


@torch.no_grad()
def test_right_padding_does_not_change_a_row(tiny):
    prompts = tiny_batch(tiny, num_prompts=3)
    together = tiny.model(prompts.tokens, prompts.audio, prompts.audio_row).logits
    for row in range(3):
        prompt = tiny_prompts(tiny, num_prompts=3)[row]
        length = len(prompt)
        alone = tiny.model(prompt.token_ids[None], audio_of([prompt])[0], torch.tensor([0])).logits
        torch.testing.assert_close(together[row, :length], alone[0], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_rows_take_the_clip_that_audio_row_names(tiny):
    prompts = tiny_batch(tiny, num_prompts=2, equal_lengths=True)
    clips = AudioBatch(waveforms=prompts.audio.waveforms.flip(0), lengths=prompts.audio.lengths.flip(0))
    swapped = replace(prompts, audio=clips, audio_row=torch.tensor([1, 0]))
    first = tiny.model(prompts.tokens, prompts.audio, prompts.audio_row).logits
    second = tiny.model(swapped.tokens, swapped.audio, swapped.audio_row).logits
    torch.testing.assert_close(first, second, atol=TOLERANCE, rtol=0)
    crossed = tiny.model(prompts.tokens, prompts.audio, torch.tensor([1, 0])).logits
    assert (crossed - first).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_audio_changes_nothing_before_its_first_placeholder_and_something_after(tiny):
    prompts = tiny_batch(tiny, num_prompts=1)
    louder = replace(prompts.audio, waveforms=prompts.audio.waveforms * 3)
    quiet = tiny.model(prompts.tokens, prompts.audio, prompts.audio_row).logits[0]
    loud = tiny.model(prompts.tokens, louder, prompts.audio_row).logits[0]
    start = int((prompts.tokens[0] == tiny.model.audio_token_id).nonzero()[0])
    assert torch.equal(quiet[:start], loud[:start])
    assert (quiet[start:] - loud[start:]).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_a_row_without_audio_is_untouched_by_its_neighbours_clips(tiny):
    prompts = tiny_batch(tiny, num_prompts=3, without_audio=(1,))
    together = tiny.model(prompts.tokens, prompts.audio, prompts.audio_row).logits
    length = len(tiny_prompts(tiny, num_prompts=3, without_audio=(1,))[1])
    nothing = AudioBatch(waveforms=torch.zeros(0, 0), lengths=torch.zeros(0, dtype=torch.int64))
    alone = tiny.model(prompts.tokens[1:2, :length], nothing, torch.tensor([-1])).logits
    torch.testing.assert_close(together[1, :length], alone[0], atol=TOLERANCE, rtol=0)


def test_a_clip_that_does_not_fill_its_placeholders_is_refused(tiny):
    prompts = tiny_batch(tiny, num_prompts=2)
    shorter = replace(prompts.audio, lengths=prompts.audio.lengths // 2)
    with pytest.raises(ValueError, match=r"row 0 has \d+ audio placeholders but its clip gives \d+ frames"):
        tiny.model(prompts.tokens, shorter, prompts.audio_row)


def test_rows_beyond_the_position_range_are_refused(tiny):
    tokens = torch.full((1, tiny.model.max_positions + 1), tiny.token_id("the"))
    nothing = AudioBatch(waveforms=torch.zeros(0, 0), lengths=torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="max_position_embeddings=128"):
        tiny.model(tokens, nothing, torch.tensor([-1]))


@torch.no_grad()
def test_the_mass_counts_placeholders_only_and_markers_not(tiny):
    """With every attention logit zero the mass of a query is the share of placeholders among the keys it sees."""
    uniform = tiny_audio_llm()
    for layer in uniform.model.language_model.decoder.layers:
        layer.self_attention.q_layernorm.weight.zero_()
    prompts = tiny_batch(uniform, num_prompts=2)
    mass = uniform.model(prompts.tokens, prompts.audio, prompts.audio_row, audio_mass="max").audio_mass
    placeholders = (prompts.tokens == uniform.model.audio_token_id).float()
    expected = placeholders.cumsum(1) / torch.arange(1, placeholders.shape[1] + 1)
    for row, length in enumerate(map(len, tiny_prompts(uniform, num_prompts=2))):
        torch.testing.assert_close(mass[row, :length], expected[row, :length], atol=TOLERANCE, rtol=0)


def test_nothing_is_captured_unless_asked_for(tiny):
    prompts = tiny_batch(tiny, num_prompts=1)
    assert tiny.model(prompts.tokens, prompts.audio, prompts.audio_row).audio_mass is None
    with pytest.raises(RuntimeError, match="no audio mass from layers"):
        tiny.model.session.layer_head_masses()


def test_capturing_the_mass_does_not_change_the_logits(tiny):
    prompts = tiny_batch(tiny, num_prompts=3)
    plain = tiny.model(prompts.tokens, prompts.audio, prompts.audio_row).logits
    captured = tiny.model(prompts.tokens, prompts.audio, prompts.audio_row, audio_mass="mean").logits
    torch.testing.assert_close(plain, captured, atol=TOLERANCE, rtol=0)


def test_the_mass_reaches_query_and_key_projections_but_not_the_output_head():
    untied = tiny_audio_llm(tied=False)
    prompts = tiny_batch(untied, num_prompts=2)
    output = untied.model(prompts.tokens, prompts.audio, prompts.audio_row, audio_mass="max")
    output.audio_mass.sum().backward()
    last = untied.model.language_model.decoder.layers[-1].self_attention
    assert last.linear_qkv.weight.grad.abs().max() > 0
    assert untied.model.language_model.output_layer.weight.grad is None
