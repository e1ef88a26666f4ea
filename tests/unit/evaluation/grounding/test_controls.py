"""Questions without their audio, and with another's: the trap is a question that hears its own clip."""

import random
from dataclasses import replace

import pytest
import torch

from nemo_mapo.data.prompts import encode_prompt
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.evaluation.grounding.controls import (
    exchanged,
    joined,
    never_alone,
    refuse_own_clips,
    silenced,
    text_only,
)
from nemo_mapo.types import AudioBatch, Example, PromptBatch, Wording

TOKENIZER = build_tokenizer()
WORDING = Wording(instruction="first last")
SPECIAL = SpecialTokens.from_tokenizer(TOKENIZER)


def audio_tokens(samples):
    return samples // 10


def batch(answers, clips):
    """One prompt for each answer; `clips` are (first sample, length), equal ones sound the same."""
    examples = tuple(
        Example(
            id=f"q{row}",
            question="how does the tone sound?",
            choices=("deep", "high", "rising"),
            answer=answer,
            task="t",
        )
        for row, answer in enumerate(answers)
    )
    rows = [
        torch.tensor(encode_prompt(example, audio_tokens(length), TOKENIZER, WORDING))
        for example, (_, length) in zip(examples, clips, strict=True)
    ]
    waveforms = torch.zeros(len(clips), max(length for _, length in clips))
    for row, (value, length) in enumerate(clips):
        waveforms[row, :length] = value
    return PromptBatch(
        tokens=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=SPECIAL.pad_id),
        lengths=torch.tensor([len(row) for row in rows]),
        audio=AudioBatch(waveforms=waveforms, lengths=torch.tensor([length for _, length in clips])),
        audio_row=torch.arange(len(clips)),
        examples=examples,
    )


PROMPTS = batch(["deep", "deep", "high", "rising"], [(0.1, 40), (0.2, 60), (0.3, 40), (0.4, 20)])


def test_exchanged_clips_are_those_of_questions_with_another_answer():
    changed = exchanged(PROMPTS, TOKENIZER, audio_tokens, WORDING)
    answers = [example.answer for example in PROMPTS.examples]
    assert sorted(changed.audio_row.tolist()) == [0, 1, 2, 3]
    assert all(answers[clip] != answers[row] for row, clip in enumerate(changed.audio_row.tolist()))


def test_a_question_has_as_many_placeholders_as_its_new_clip_has_tokens():
    changed = exchanged(PROMPTS, TOKENIZER, audio_tokens, WORDING)
    placeholders = (changed.tokens == SPECIAL.audio_id).sum(1)
    assert placeholders.tolist() == [audio_tokens(int(PROMPTS.audio.lengths[clip])) for clip in changed.audio_row]


def test_a_question_is_asked_in_the_same_words_about_its_new_clip():
    changed = exchanged(PROMPTS, TOKENIZER, audio_tokens, WORDING)
    for batch_of in (PROMPTS, changed):
        texts = [
            TOKENIZER.decode(tokens[:length][tokens[:length] != SPECIAL.audio_id])
            for tokens, length in zip(batch_of.tokens, batch_of.lengths, strict=True)
        ]
        assert all(text.count(WORDING.instruction) == 1 for text in texts)


def test_a_clip_that_sounds_like_ones_own_is_not_another_clip():
    alike = batch(["deep", "high", "rising", "high"], [(0.1, 40), (0.1, 40), (0.3, 40), (0.4, 20)])
    changed = exchanged(alike, TOKENIZER, audio_tokens, WORDING)
    assert {int(changed.audio_row[0]), int(changed.audio_row[1])} == {2, 3}


def test_a_question_that_hears_its_own_clip_is_caught():
    wrong = replace(PROMPTS, audio_row=torch.tensor([1, 0, 2, 3]))
    with pytest.raises(ValueError, match="q2 was to hear the clip of another question and hears its own"):
        refuse_own_clips(PROMPTS, wrong)


@pytest.mark.parametrize("prompts", [batch(["deep"], [(0.1, 40)]), batch(["deep", "high"], [(0.1, 40), (0.1, 40)])])
def test_clips_that_cannot_be_exchanged_are_refused(prompts):
    with pytest.raises(ValueError, match="cannot be exchanged"):
        exchanged(prompts, TOKENIZER, audio_tokens, WORDING)


def test_text_only_questions_are_those_of_a_model_without_ears():
    changed = text_only(PROMPTS, SPECIAL)
    expected = [encode_prompt(example, 0, TOKENIZER, WORDING) for example in PROMPTS.examples]
    assert [
        row[:length] for row, length in zip(changed.tokens.tolist(), changed.lengths.tolist(), strict=True)
    ] == expected
    assert changed.audio_row.tolist() == [-1] * 4 and len(changed.audio.lengths) == 0


def test_silence_is_as_long_as_the_clip():
    changed = silenced(PROMPTS)
    assert not changed.audio.waveforms.any() and torch.equal(changed.audio.lengths, PROMPTS.audio.lengths)


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
    assert sorted(changed.audio_row.tolist()) == list(range(size))
    own = [{0, 1} if row < 2 else {row} for row in range(size)]
    assert all(clip not in own[row] for row, clip in enumerate(changed.audio_row.tolist()))


def one_by_one(prompts, sizes):
    """The prompts in batches of the given sizes, each as narrow as its own rows and clips."""
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        lengths = prompts.lengths[rows]
        samples = prompts.audio.lengths[rows]
        yield PromptBatch(
            tokens=prompts.tokens[rows, : int(lengths.max())],
            lengths=lengths,
            audio=AudioBatch(waveforms=prompts.audio.waveforms[rows, : int(samples.max())], lengths=samples),
            audio_row=torch.arange(size),
            examples=prompts.examples[rows],
        )
        start += size


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([4], [4]), ([3, 1], [4]), ([2, 2], [2, 2]), ([1, 1, 1, 1], [2, 2]), ([1, 2, 1], [4]), ([1, 3], [4])],
)
def test_no_question_is_left_alone_in_a_batch_and_all_keep_their_order(sizes, expected):
    batches = list(never_alone(one_by_one(PROMPTS, sizes), SPECIAL.pad_id))
    assert [len(part) for part in batches] == expected
    assert [example.id for part in batches for example in part.examples] == ["q0", "q1", "q2", "q3"]


def test_joined_batches_are_the_batch_that_was_cut():
    first, second = one_by_one(PROMPTS, [3, 1])
    whole = joined(first, second, SPECIAL.pad_id)
    assert torch.equal(whole.tokens, PROMPTS.tokens) and torch.equal(whole.lengths, PROMPTS.lengths)
    assert torch.equal(whole.audio.waveforms, PROMPTS.audio.waveforms)
    assert whole.audio_row.tolist() == [0, 1, 2, 3] and whole.examples == PROMPTS.examples


def test_a_question_without_a_clip_stays_without_one_when_joined():
    assert joined(PROMPTS, text_only(PROMPTS, SPECIAL), SPECIAL.pad_id).audio_row.tolist() == [0, 1, 2, 3, *[-1] * 4]


def test_one_question_in_all_stays_alone():
    assert [len(part) for part in never_alone(one_by_one(PROMPTS, [1]), SPECIAL.pad_id)] == [1]
