"""Questions without their audio, and with another's: the trap is a question that hears its own clip."""

import random
from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from nemo_mapo.data.prompts import encode_prompt
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.evaluation.grounding.controls import (
    exchanged,
    never_alone,
    refuse_own_clips,
    silenced,
    text_only,
)
from nemo_mapo.rows import Problem, Prompt
from nemo_mapo.types import Example, Wording

TOKENIZER = build_tokenizer()
WORDING = Wording(instruction="first last")
SPECIAL = SpecialTokens.from_tokenizer(TOKENIZER)


def audio_tokens(samples):
    return samples // 10


def batch(answers, clips):
    """One problem for each answer; `clips` are (first sample, length), equal ones sound the same."""
    return [problem(row, answer, *clip) for row, (answer, clip) in enumerate(zip(answers, clips, strict=True))]


def problem(row, answer, value, length):
    example = Example(
        id=f"q{row}", question="how does the tone sound?", choices=("deep", "high", "rising"), answer=answer, task="t"
    )
    token_ids = torch.tensor(encode_prompt(example, audio_tokens(length), TOKENIZER, WORDING))
    clips = (torch.full((length,), value),)
    return Problem(prompt=Prompt(id=example.id, token_ids=token_ids, clips=clips), example=example)


def heard(before, after):
    """Numbers of the problems whose clips are heard now."""
    clips = [id(one.prompt.clips[0]) for one in before]
    return [clips.index(id(one.prompt.clips[0])) for one in after]


PROBLEMS = batch(["deep", "deep", "high", "rising"], [(0.1, 40), (0.2, 60), (0.3, 40), (0.4, 20)])


def test_exchanged_clips_are_those_of_questions_with_another_answer():
    changed = exchanged(PROBLEMS, TOKENIZER, audio_tokens, WORDING)
    answers = [problem.example.answer for problem in PROBLEMS]
    assert sorted(heard(PROBLEMS, changed)) == [0, 1, 2, 3]
    assert all(answers[clip] != answers[row] for row, clip in enumerate(heard(PROBLEMS, changed)))


def test_a_question_has_as_many_placeholders_as_its_new_clip_has_tokens():
    for changed in exchanged(PROBLEMS, TOKENIZER, audio_tokens, WORDING):
        (clip,) = changed.prompt.clips
        assert int((changed.prompt.token_ids == SPECIAL.audio_id).sum()) == audio_tokens(len(clip))


def test_a_question_is_asked_in_the_same_words_about_its_new_clip():
    for asked in (*PROBLEMS, *exchanged(PROBLEMS, TOKENIZER, audio_tokens, WORDING)):
        ids = asked.prompt.token_ids
        assert TOKENIZER.decode(ids[ids != SPECIAL.audio_id]).count(WORDING.instruction) == 1


def test_a_clip_that_sounds_like_ones_own_is_not_another_clip():
    alike = batch(["deep", "high", "rising", "high"], [(0.1, 40), (0.1, 40), (0.3, 40), (0.4, 20)])
    changed = exchanged(alike, TOKENIZER, audio_tokens, WORDING)
    assert set(heard(alike, changed)[:2]) == {2, 3}


def test_a_question_that_hears_its_own_clip_is_caught():
    order = [1, 0, 2, 3]
    wrong = [
        replace(one, prompt=replace(one.prompt, clips=PROBLEMS[clip].prompt.clips))
        for one, clip in zip(PROBLEMS, order, strict=True)
    ]
    with pytest.raises(ValueError, match="q2 should hear the clip of another question but hears its own"):
        refuse_own_clips(PROBLEMS, wrong)


@pytest.mark.parametrize("problems", [batch(["deep"], [(0.1, 40)]), batch(["deep", "high"], [(0.1, 40), (0.1, 40)])])
def test_clips_that_cannot_be_exchanged_are_refused(problems):
    with pytest.raises(ValueError, match="cannot be exchanged"):
        exchanged(problems, TOKENIZER, audio_tokens, WORDING)


def test_text_only_questions_are_those_of_a_model_without_audio():
    for asked in text_only(PROBLEMS, SPECIAL):
        assert asked.prompt.token_ids.tolist() == encode_prompt(asked.example, 0, TOKENIZER, WORDING)
        assert asked.prompt.clips == ()


def test_silence_is_as_long_as_the_clip():
    for before, after in zip(PROBLEMS, silenced(PROBLEMS), strict=True):
        assert not after.prompt.clips[0].any() and len(after.prompt.clips[0]) == len(before.prompt.clips[0])


@pytest.mark.parametrize("seed", range(30))
def test_no_question_of_a_random_batch_hears_its_own_clip(seed):
    generator = random.Random(seed)
    size = generator.randint(3, 9)
    answers = [generator.choice(["deep", "high", "rising"]) for _ in range(size)]
    # The third sound is one that the first two questions share.
    clips = [(0.5, 40), (0.5, 40), *((0.1 * row, 10 * generator.randint(2, 6)) for row in range(6, size + 4))]
    prompts = batch(answers, clips)
    if size == 3:
        with pytest.raises(ValueError, match="cannot be exchanged"):
            exchanged(prompts, TOKENIZER, audio_tokens, WORDING)
        return
    changed = exchanged(prompts, TOKENIZER, audio_tokens, WORDING)
    now = heard(prompts, changed)
    assert sorted(now) == list(range(size))
    own = [{0, 1} if row < 2 else {row} for row in range(size)]
    assert all(clip not in own[row] for row, clip in enumerate(now))


def one_by_one(problems, sizes):
    """The problems in batches of the given sizes."""
    ends = list(accumulate(sizes))
    return [problems[end - size : end] for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([4], [4]), ([3, 1], [4]), ([2, 2], [2, 2]), ([1, 1, 1, 1], [2, 2]), ([1, 2, 1], [4]), ([1, 3], [4])],
)
def test_no_question_is_left_alone_in_a_batch_and_all_keep_their_order(sizes, expected):
    batches = list(never_alone(one_by_one(PROBLEMS, sizes)))
    assert [len(part) for part in batches] == expected
    assert [problem.example.id for part in batches for problem in part] == ["q0", "q1", "q2", "q3"]


def test_one_question_in_all_stays_alone():
    assert [len(part) for part in never_alone(one_by_one(PROBLEMS, [1]))] == [1]
