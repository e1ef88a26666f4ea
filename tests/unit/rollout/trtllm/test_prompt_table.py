"""Clips of unequal length in one table, and prompts whose placeholders name its rows."""

import pytest
import torch

from nemo_mapo.rollout.trtllm.prompt_table import engine_batches, pack_prompts
from nemo_mapo.types import AudioBatch, Example, PromptBatch

VOCAB = 100
AUDIO = 7


def prompts(rows: list[list[int]], audio_row: list[int], clips: int) -> PromptBatch:
    longest = max(map(len, rows))
    return PromptBatch(
        tokens=torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows]),
        lengths=torch.tensor([len(row) for row in rows]),
        audio=AudioBatch(waveforms=torch.zeros(clips, 4), lengths=torch.full((clips,), 4)),
        audio_row=torch.tensor(audio_row),
        examples=tuple(
            Example(id=f"q{number}", question="?", choices=("a", "b"), answer="a", task="t")
            for number in range(len(rows))
        ),
    )


def test_clips_of_unequal_length_stand_in_the_table_without_padding():
    asked = prompts([[1, AUDIO, AUDIO, 2], [3], [4, AUDIO, 5], [6, AUDIO, AUDIO]], [0, -1, 1, 0], clips=2)
    frames = torch.arange(12.0).view(2, 3, 2)
    packed = pack_prompts(asked, frames, torch.tensor([2, 1]), group_size=1, vocab_size=VOCAB, audio_token_id=AUDIO)
    assert packed.prompt_table is not None
    assert packed.prompt_table.tolist() == [[0.0, 1.0], [2.0, 3.0], [6.0, 7.0]]
    assert [ids.tolist() for ids in packed.batch_input_ids] == [[1, 100, 101, 2], [3], [4, 102, 5], [6, 100, 101]]
    assert packed.prompt_tasks == "0,0,0,0"
    assert {ids.dtype for ids in packed.batch_input_ids} == {torch.int32}


def test_the_completions_of_a_group_share_their_clips_rows():
    asked = prompts([[1, AUDIO], [AUDIO, 2]], [0, 1], clips=2)
    packed = pack_prompts(
        asked, torch.ones(2, 1, 3), torch.tensor([1, 1]), group_size=2, vocab_size=VOCAB, audio_token_id=AUDIO
    )
    assert [ids.tolist() for ids in packed.batch_input_ids] == [[1, 100], [1, 100], [101, 2], [101, 2]]
    assert packed.prompt_table is not None and packed.prompt_table.shape == (2, 3)
    assert packed.prompt_tasks == "0,0,0,0"


def test_prompts_without_audio_need_no_table():
    asked = prompts([[1, 2], [3]], [-1, -1], clips=0)
    packed = pack_prompts(
        asked,
        torch.zeros(0, 0, 3),
        torch.zeros(0, dtype=torch.int64),
        group_size=1,
        vocab_size=VOCAB,
        audio_token_id=AUDIO,
    )
    assert packed.prompt_table is None and packed.prompt_tasks is None
    assert [ids.tolist() for ids in packed.batch_input_ids] == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("row", "clip", "given"), [([AUDIO, 1], 0, 2), ([AUDIO, AUDIO, AUDIO], 0, 2), ([AUDIO], -1, 0)]
)
def test_a_clip_that_does_not_fill_its_placeholders_is_refused(row: list[int], clip: int, given: int):
    asked = prompts([row], [clip], clips=1)
    with pytest.raises(ValueError, match=f"'q0' has {row.count(AUDIO)} audio placeholders, and its clip {given}"):
        pack_prompts(
            asked, torch.ones(1, 2, 3), torch.tensor([2]), group_size=1, vocab_size=VOCAB, audio_token_id=AUDIO
        )


def test_batches_are_cut_by_prompts_and_by_rows_of_the_table():
    assert list(engine_batches([1, 1, 1, 1, 1], most_prompts=2, most_rows=10)) == [[0, 1], [2, 3], [4]]
    assert list(engine_batches([6, 4, 1, 10, 0], most_prompts=9, most_rows=10)) == [[0, 1], [2], [3, 4]]
