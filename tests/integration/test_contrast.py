"""What the audio changes about each token: read in every layout, and taken by the masks in place of delta h."""

import pytest
import torch

from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.layout import MicroBatching, audio_batch, audio_of
from nemo_mapo.rows import Row
from nemo_mapo.training.contrast import audio_contrast
from nemo_mapo.training.references import FrozenReference
from nemo_mapo.training.signals import token_signals_in_parts
from support.tiny import TinyAudioLLM, tiny_audio_llm, tiny_rows

pytestmark = pytest.mark.integration

LAYOUTS = {
    "padded": MicroBatching(rows=4),
    "packed": MicroBatching(rows=1, packed_tokens=90),
    "shared": MicroBatching(rows=6, shared_prompts=True),
}


@pytest.fixture(scope="module")
def tiny() -> TinyAudioLLM:
    return tiny_audio_llm()


@torch.no_grad()
def slow(tiny: TinyAudioLLM, other: TinyAudioLLM, rows: list[Row], kind: str) -> list[torch.Tensor]:
    """Row by row, softmaxes written out; the text-only row by dropping the audio span by hand."""
    special = SpecialTokens.from_tokenizer(tiny.tokenizer)
    audio = (special.audio_id, special.audio_start_id, special.audio_end_id)
    found = []
    for row in rows:
        tokens, length = torch.cat([row.prompt.token_ids, row.token_ids]), len(row.token_ids)
        text = torch.tensor([token for token in tokens.tolist() if token not in audio])
        heard = tiny.model(tokens[None], audio_of([row.prompt])[0], torch.zeros(1, dtype=torch.int64)).logits
        unheard = other.model(text[None], audio_batch([]), torch.full((1,), -1)).logits
        p, q = (logits[0, -length - 1 : -1].log_softmax(-1) for logits in (heard, unheard))
        drawn = tokens[-length:, None]
        by_kind = {
            "kl": (p.exp() * (p - q)).nansum(-1),
            "log_ratio": (p.gather(1, drawn) - q.gather(1, drawn))[:, 0],
        }
        found.append(by_kind[kind])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["kl", "log_ratio"])
def test_the_contrast_is_that_of_rows_read_alone(tiny: TinyAudioLLM, layout: str, kind: str) -> None:
    start = tiny_audio_llm(seed=1)
    special = SpecialTokens.from_tokenizer(tiny.tokenizer)
    rows = tiny_rows(tiny, num_prompts=2, group_size=3)
    batching = LAYOUTS[layout]
    tiny.model.eval()
    reference = FrozenReference(start.model, special, keep_placeholders=False, batching=batching)
    signals = dict(enumerate(token_signals_in_parts(tiny.model, rows, head_reduction=None, batching=batching)))
    found = audio_contrast(tiny.model, reference, rows, signals, kind, batching)
    torch.testing.assert_close(found, slow(tiny, start, rows, kind), atol=1e-4, rtol=1e-4)
    assert audio_contrast(tiny.model, reference, rows, signals, "delta_entropy", batching) is None
