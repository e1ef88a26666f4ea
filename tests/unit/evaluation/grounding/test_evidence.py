"""Which frames are silenced, and what that does to the waveform."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nemo_mapo.evaluation.grounding.evidence import choose_frames, silence_frames
from nemo_mapo.evaluation.grounding.listening import Listening
from nemo_mapo.rows import Problem, Prompt
from nemo_mapo.types import Example

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


def problems(lengths):
    return [
        Problem(
            prompt=Prompt(id=f"q{row}", token_ids=torch.tensor([1]), clips=(torch.ones(length),)),
            example=Example(id=f"q{row}", question="?", choices=("a", "b"), answer="a", task="t"),
        )
        for row, length in enumerate(lengths)
    ]


def clip(problem):
    return problem.prompt.clips[0]


def heard(*frames):
    return [Listening(mass=torch.zeros(1, 1, 1), frames=torch.tensor(of_clip)) for of_clip in frames]


def test_the_samples_of_the_chosen_frames_become_silent_and_no_others():
    before = problems([10, 9])
    after = silence_frames(before, heard([0.1, 0.9, 0.2], [0.9, 0.1]), 0.3, "top", seed=0)
    # Frame 1 of 3 over 10 samples: ceil(10/3) = 4 to ceil(20/3) = 7; frame 0 of 2 over 9: 0 to ceil(9/2) = 5.
    assert (clip(after[0]) == 0).nonzero().flatten().tolist() == [4, 5, 6]
    assert (clip(after[1]) == 0).nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert clip(before[0]).all() and clip(before[1]).all(), "the given prompts stay as they are"


def test_the_random_frames_of_a_question_do_not_depend_on_its_neighbours():
    listening = heard([0.1, 0.9, 0.2, 0.3], [0.9, 0.1, 0.0, 0.5])
    together = silence_frames(problems([40, 40]), listening, 0.5, "random", seed=3)
    alone = silence_frames(problems([40]), heard([0.1, 0.9, 0.2, 0.3]), 0.5, "random", seed=3)
    assert torch.equal(clip(together[0]), clip(alone[0]))


def test_two_questions_about_one_clip_each_lose_what_they_listened_to():
    one, other = problems([10, 10])
    same = replace(other, prompt=replace(other.prompt, clips=one.prompt.clips))
    first, second = silence_frames([one, same], heard([0.9, 0.1], [0.1, 0.9]), 0.5, "top", seed=0)
    assert clip(first).tolist() == [0.0] * 5 + [1.0] * 5 and clip(second).tolist() == [1.0] * 5 + [0.0] * 5
