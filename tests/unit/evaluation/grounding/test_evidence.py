"""Which frames are silenced, and what that does to the waveform."""

import numpy as np
import pytest
import torch

from nemo_mapo.evaluation.grounding.evidence import choose_frames, silence_frames
from nemo_mapo.evaluation.grounding.listening import Listening
from nemo_mapo.types import AudioBatch, Example, PromptBatch

ATTENTION = np.array([0.1, 0.5, 0.4, 0.0, 0.3, 0.2, 0.05, 0.6, 0.01, 0.02])


def frames(selection, ratio, seed=0, attention=ATTENTION):
    return np.flatnonzero(choose_frames(attention, ratio, selection, np.random.default_rng(seed))).tolist()


def runs(chosen, total):
    mask = np.zeros(total, dtype=np.int8)
    mask[chosen] = 1
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return sorted((edges[1::2] - edges[::2]).tolist())


def test_the_most_and_the_least_attended_frames_are_those_of_the_attention():
    assert frames("top", 0.3) == [1, 2, 7]
    assert frames("low", 0.3) == [3, 8, 9]


@pytest.mark.parametrize("selection", ["top", "random", "low"])
@pytest.mark.parametrize(("ratio", "count"), [(0.05, 1), (0.1, 1), (0.11, 2), (0.5, 5)])
def test_every_selection_silences_equally_many_frames_rounded_up(selection, ratio, count):
    assert len(frames(selection, ratio)) == count


@pytest.mark.parametrize("seed", range(50))
def test_random_frames_stand_in_runs_as_long_as_the_top_ones(seed):
    attention = np.random.default_rng(seed).random(23)
    for ratio in (0.1, 0.3, 0.5, 0.9):
        top, random = (frames(selection, ratio, seed, attention) for selection in ("top", "random"))
        assert runs(random, 23) == runs(top, 23)


def test_random_frames_reach_every_place():
    reached = set().union(*(frames("random", 0.3, seed) for seed in range(200)))
    assert reached == set(range(10))


def prompts(lengths, rows=None):
    examples = tuple(
        Example(id=f"q{row}", question="?", choices=("a", "b"), answer="a", task="t") for row in range(len(lengths))
    )
    return PromptBatch(
        tokens=torch.zeros(len(lengths), 1, dtype=torch.int64),
        lengths=torch.ones(len(lengths), dtype=torch.int64),
        audio=AudioBatch(waveforms=torch.ones(len(lengths), max(lengths)), lengths=torch.tensor(lengths)),
        audio_row=torch.arange(len(lengths)) if rows is None else torch.tensor(rows),
        examples=examples,
    )


def heard(frames, counts):
    return Listening(
        mass=torch.zeros(len(counts), 1, 1, 1), frames=torch.tensor(frames), num_frames=torch.tensor(counts)
    )


def test_the_samples_of_the_chosen_frames_become_silent_and_no_others():
    before = prompts([10, 9])
    after = silence_frames(before, heard([[0.1, 0.9, 0.2], [0.9, 0.1, 0.0]], [3, 2]), 0.3, "top", seed=0)
    # Frame 1 of 3 over 10 samples: ceil(10/3) = 4 to ceil(20/3) = 7; frame 0 of 2 over 9: 0 to ceil(9/2) = 5.
    assert (after.audio.waveforms[0] == 0).nonzero().flatten().tolist() == [4, 5, 6]
    assert (after.audio.waveforms[1, :9] == 0).nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(before.audio.waveforms, torch.ones(2, 10)), "the given prompts stay as they are"


def test_the_random_frames_of_a_question_do_not_depend_on_its_neighbours():
    listening = heard([[0.1, 0.9, 0.2, 0.3], [0.9, 0.1, 0.0, 0.5]], [4, 4])
    together = silence_frames(prompts([40, 40]), listening, 0.5, "random", seed=3)
    alone = silence_frames(prompts([40]), heard([[0.1, 0.9, 0.2, 0.3]], [4]), 0.5, "random", seed=3)
    assert torch.equal(together.audio.waveforms[0], alone.audio.waveforms[0])


def test_two_questions_about_one_clip_are_refused():
    with pytest.raises(ValueError, match="one clip for each prompt"):
        silence_frames(prompts([10, 10], rows=[0, 0]), heard([[1.0], [1.0]], [1, 1]), 0.5, "top", seed=0)
