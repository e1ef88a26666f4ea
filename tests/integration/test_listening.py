"""Attention weights written out for the analysis are those of the audio mass that the loss uses."""

import pytest
import torch

from nemo_mapo.attention.dense import dense_attention_weights
from nemo_mapo.data.sequences import token_batch
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.evaluation.grounding.listening import attention_rows, listen
from nemo_mapo.training.signals import token_signals
from support.tiny import tiny_audio_llm, tiny_rows

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def tiny():
    return tiny_audio_llm()


@pytest.fixture(scope="module")
def sequences(tiny):
    rows = tiny_rows(tiny, num_prompts=3, group_size=2)
    return token_batch(rows, pad_id=SpecialTokens.from_tokenizer(tiny.tokenizer).pad_id)


@pytest.mark.parametrize("rows_at_a_time", [1, 4])
def test_the_mass_of_all_heads_reduces_to_the_audio_mass(tiny, sequences, rows_at_a_time):
    tiny.model.eval()
    expected = token_signals(tiny.model, sequences, head_reduction="max").audio_mass
    mass = listen(tiny.model, sequences, rows_at_a_time=rows_at_a_time).mass
    assert mass.amax(2).mean(1) == pytest.approx(expected.detach(), abs=1e-6)


def test_the_attention_on_all_frames_adds_up_to_the_mean_mass(tiny, sequences):
    tiny.model.eval()
    listening = listen(tiny.model, sequences, rows_at_a_time=2)
    mean_mass = listening.mass.mean((1, 2)).sum(1) / sequences.completion_lengths
    assert listening.frames.sum(1) == pytest.approx(mean_mass, abs=1e-6)
    assert mean_mass.max() > 0.01


def test_frames_lie_where_the_placeholders_are(tiny, sequences):
    listening = listen(tiny.model, sequences, rows_at_a_time=2)
    placeholders = (sequences.tokens == tiny.model.audio_token_id).sum(1)
    assert torch.equal(listening.num_frames, placeholders)
    beyond = torch.arange(listening.frames.shape[1]) >= listening.num_frames[:, None]
    assert not listening.frames[beyond].any()


def test_weights_of_chosen_queries_are_rows_of_the_dense_weights():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 7, 4, 8, generator=generator), torch.randn(2, 7, 2, 8, generator=generator)
    positions = torch.tensor([[0, 3], [6, 2]])
    dense = dense_attention_weights(query, key)
    chosen = attention_rows(query, key, positions)
    for row in range(2):
        assert torch.allclose(chosen[row], dense[row][:, positions[row]], atol=1e-6)
