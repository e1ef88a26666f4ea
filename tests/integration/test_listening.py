"""Attention weights written out for the analysis are those of the audio mass that the loss uses."""

import pytest
import torch

from nemo_mapo.attention.dense import dense_attention_weights
from nemo_mapo.evaluation.grounding.listening import attention_rows, listen
from nemo_mapo.training.signals import token_signals
from support.tiny import tiny_audio_llm, tiny_rows

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def tiny():
    return tiny_audio_llm()


@pytest.fixture(scope="module")
def rows(tiny):
    return tiny_rows(tiny, num_prompts=3, group_size=2)


@pytest.mark.parametrize("rows_at_a_time", [1, 4])
def test_the_mass_of_all_heads_reduces_to_the_audio_mass(tiny, rows, rows_at_a_time):
    tiny.model.eval()
    expected = token_signals(tiny.model, rows, head_reduction="max")
    found = listen(tiny.model, rows, rows_at_a_time=rows_at_a_time)
    for heard, signals in zip(found, expected, strict=True):
        assert heard.mass.amax(1).mean(0) == pytest.approx(signals.audio_mass.detach(), abs=1e-6)


def test_the_attention_on_all_frames_adds_up_to_the_mean_mass(tiny, rows):
    tiny.model.eval()
    for heard in listen(tiny.model, rows, rows_at_a_time=2):
        assert float(heard.frames.sum()) == pytest.approx(float(heard.mass.mean()), abs=1e-6)
        assert heard.mass.mean() > 0.01


def test_frames_lie_where_the_placeholders_are(tiny, rows):
    for heard, row in zip(listen(tiny.model, rows, rows_at_a_time=2), rows, strict=True):
        assert len(heard.frames) == int((row.prompt.token_ids == tiny.model.audio_token_id).sum()) > 0


def test_weights_of_chosen_queries_are_rows_of_the_dense_weights():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 7, 4, 8, generator=generator), torch.randn(2, 7, 2, 8, generator=generator)
    positions = torch.tensor([[0, 3], [6, 2]])
    dense = dense_attention_weights(query, key)
    chosen = attention_rows(query, key, positions)
    for row in range(2):
        assert torch.allclose(chosen[row], dense[row][:, positions[row]], atol=1e-6)
