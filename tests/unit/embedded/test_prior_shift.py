"""In training the text predicts the answer; elsewhere it does not, and the description gives nothing away."""

import collections

import pytest
from lhotse import CutSet

from nemo_mapo.embedded.prior_shift import (
    AFTER,
    CONTRADICTING,
    USUAL_WORDS,
    PriorShiftConfig,
    asked_sound,
    completion,
    description,
    plan_prior_shift,
    prior_shift_recipe,
    prior_shift_tokenizer,
)
from nemo_mapo.embedded.synthetic import write_recipe
from nemo_mapo.embedded.synthetic_text import ATTRIBUTES

CONFIG = PriorShiftConfig(train=1600, validation=32, test=320)


def usual_share(clips) -> float:
    right = [clip.example.answer == USUAL_WORDS[asked_sound(clip).kind] for clip in clips]
    return sum(right) / len(right)


def test_the_usual_word_is_right_in_training_and_no_better_than_chance_elsewhere() -> None:
    assert usual_share(plan_prior_shift(CONFIG, "train")) == pytest.approx(CONFIG.usual_share, abs=0.04)
    for split in ("validation", "test"):
        counts = collections.Counter(clip.example.answer for clip in plan_prior_shift(CONFIG, split))
        assert len(counts) == 16 and len(set(counts.values())) == 1


def test_the_question_and_the_description_do_not_tell_the_answer() -> None:
    words = {word for words in ATTRIBUTES.values() for word in words}
    for clip in plan_prior_shift(CONFIG, "test"):
        assert not words & set(description([event.kind for event in clip.events]).replace(",", "").split())
        assert not words & set(clip.example.question.replace("?", "").split())


def test_the_answer_is_true_of_the_sound_that_is_asked_about_and_of_no_other_of_its_kind() -> None:
    clips = plan_prior_shift(CONFIG, "test")
    for clip in clips:
        asked = asked_sound(clip)
        assert clip.events[asked.place].attribute == clip.example.answer
        same = [event for event in clip.events if event.kind == asked.kind]
        assert len(same) == (2 if clip.example.task == AFTER else 1)
        assert sum(event.attribute == clip.example.answer for event in same) == 1
        if clip.example.task == AFTER:
            assert f"after the {clip.events[asked.place - 1].kind} " in clip.example.question
    assert {clip.example.task for clip in clips} == {"named", "after"}


def test_completions_of_a_clip_differ_in_their_beliefs_alone_and_every_word_is_a_token() -> None:
    clip = plan_prior_shift(CONFIG, "test")[0]
    tokenizer = prior_shift_tokenizer()
    texts = [completion(clip, choice) for choice in clip.example.choices]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert len({len(row) for row in ids}) == 1 and len(ids[0]) < 70
    assert all(tokenizer.decode(row) == text for row, text in zip(ids, texts, strict=True))
    head = description([event.kind for event in clip.events])
    assert all(text.startswith(f"<think> {head} the ") for text in texts)


def test_the_contradicting_manifest_is_the_part_of_the_test_split_that_the_prior_gets_wrong(tmp_path) -> None:
    small = PriorShiftConfig(train=1, validation=1, test=16)
    write_recipe(prior_shift_recipe(small), tmp_path / "corpus", progress=False)
    test, opposed = (
        list(CutSet.from_file(tmp_path / "corpus" / f"cuts_{name}.jsonl.gz")) for name in ("test", CONTRADICTING)
    )
    wrong = [cut.id for cut in test if cut.custom["answer"] != cut.custom["usual"]]
    assert [cut.id for cut in opposed] == wrong and len(wrong) == 12
    assert set(test[0].custom["completions"]) == set(test[0].custom["choices"])
    assert test[0].custom["completions"][test[0].custom["answer"]] == test[0].custom["reasoning"]
