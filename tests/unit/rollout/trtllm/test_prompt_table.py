"""Clips of unequal length in one table, and prompts whose placeholders name its rows."""

import pytest
import torch

from nemo_mapo.rollout.trtllm.prompt_table import engine_batches, pack_prompts
from nemo_mapo.rows import Prompt

VOCAB = 100
AUDIO = 7


def prompts(rows: list[list[int]]) -> list[Prompt]:
    return [Prompt(id=f"q{number}", token_ids=torch.tensor(row)) for number, row in enumerate(rows)]


def test_clips_of_unequal_length_stand_in_the_table_without_padding():
    asked = prompts([[1, AUDIO, AUDIO, 2], [3], [4, AUDIO, 5], [6, AUDIO, AUDIO]])
    frames = torch.arange(12.0).view(2, 3, 2)
    heard = torch.tensor([0, -1, 1, 0])
    packed = pack_prompts(
        asked, frames, torch.tensor([2, 1]), heard, group_size=1, vocab_size=VOCAB, audio_token_id=AUDIO
    )
    assert packed.prompt_table is not None
    assert packed.prompt_table.tolist() == [[0.0, 1.0], [2.0, 3.0], [6.0, 7.0]]
    assert [ids.tolist() for ids in packed.batch_input_ids] == [[1, 100, 101, 2], [3], [4, 102, 5], [6, 100, 101]]
    assert packed.prompt_tasks == "0,0,0,0"
    assert {ids.dtype for ids in packed.batch_input_ids} == {torch.int32}


def test_the_completions_of_a_group_share_their_clips_rows():
    asked = prompts([[1, AUDIO], [AUDIO, 2]])
    packed = pack_prompts(
        asked,
        torch.ones(2, 1, 3),
        torch.tensor([1, 1]),
        torch.tensor([0, 1]),
        group_size=2,
        vocab_size=VOCAB,
        audio_token_id=AUDIO,
    )
    assert [ids.tolist() for ids in packed.batch_input_ids] == [[1, 100], [1, 100], [101, 2], [101, 2]]
    assert packed.prompt_table is not None and packed.prompt_table.shape == (2, 3)
    assert packed.prompt_tasks == "0,0,0,0"


def test_prompts_without_audio_need_no_table():
    asked = prompts([[1, 2], [3]])
    packed = pack_prompts(
        asked,
        torch.zeros(0, 0, 3),
        torch.zeros(0, dtype=torch.int64),
        torch.tensor([-1, -1]),
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
    asked, heard = prompts([row]), torch.tensor([clip])
    with pytest.raises(ValueError, match=f"'q0' has {row.count(AUDIO)} audio placeholders, and its clip {given}"):
        pack_prompts(
            asked, torch.ones(1, 2, 3), torch.tensor([2]), heard, group_size=1, vocab_size=VOCAB, audio_token_id=AUDIO
        )


def test_batches_are_cut_by_prompts_and_by_rows_of_the_table():
    assert list(engine_batches([1, 1, 1, 1, 1], most_prompts=2, most_rows=10)) == [[0, 1], [2, 3], [4]]
    assert list(engine_batches([6, 4, 1, 10, 0], most_prompts=9, most_rows=10)) == [[0, 1], [2], [3, 4]]
