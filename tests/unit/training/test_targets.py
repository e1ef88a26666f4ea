"""What supervised training learns: the fields of a manifest as a completion."""

from dataclasses import replace

import pytest

from nemo_mapo.config.data import TargetConfig
from nemo_mapo.rewards.templates import split_completion
from nemo_mapo.training.targets import TargetRows, hide_clips, target_text
from nemo_mapo.types import Example
from support.tiny import tiny_audio_llm, tiny_problems

BARE = Example(id="a", question="what is it?", choices=("low", "high"), answer="low", task="tone")
REASONED = replace(BARE, reasoning="I hear a hum.", caption="a hum")
CONFIG = TargetConfig()


@pytest.mark.parametrize(
    ("example", "template", "text"),
    [
        (REASONED, "think", "<think> I hear a hum.</think> low"),
        (REASONED, "reasoning", "<reasoning>I hear a hum.</reasoning><answer>low</answer>"),
        (replace(REASONED, reasoning=None), "think", "<think> a hum So the answer is low.</think> low"),
        (BARE, "think", "<think> The answer seems to be low.</think> low"),
        (replace(BARE, reasoning="<think> hm.</think> low"), "think", "<think> hm.</think> low"),
    ],
)
def test_reasoning_comes_from_the_manifest_or_is_written_from_caption_or_answer(example, template, text):
    assert target_text(example, CONFIG, template) == text
    assert split_completion(text, template).answer == example.answer


def test_plain_targets_are_the_answer_and_need_no_choices():
    pair = replace(BARE, choices=(), answer="A dog barks twice.")
    assert target_text(pair, TargetConfig(form="plain"), "think") == "A dog barks twice."


def test_verbatim_targets_are_the_reasoning_as_it_stands():
    assert target_text(REASONED, TargetConfig(form="verbatim"), "think") == "I hear a hum."
    with pytest.raises(ValueError, match=r"^a: no 'reasoning'"):
        target_text(BARE, TargetConfig(form="verbatim"), "think")


def test_texts_of_the_manifest_are_filled_in_as_they_are():
    tricky = replace(BARE, caption="a {answer} and {caption.__class__}")
    config = TargetConfig(from_caption="{caption}|{answer}|{question}")
    assert "a {answer} and {caption.__class__}|low|what is it?" in target_text(tricky, config, "think")


@pytest.mark.parametrize(
    ("changes", "config", "said"),
    [
        ({}, TargetConfig(from_answer=None), "neither 'reasoning' nor 'caption'"),
        ({"reasoning": "<think> hm.</think> high"}, CONFIG, "not a completion in the tags of rewards.template=think"),
        ({"reasoning": "<think> not closed"}, CONFIG, "put only the reasoning into 'reasoning'"),
        ({"reasoning": "..."}, CONFIG, "not a completion in the tags"),
    ],
)
def test_what_cannot_be_learned_is_refused_by_name(changes, config, said):
    with pytest.raises(ValueError, match=r"^a: ") as refused:
        target_text(replace(BARE, **changes), config, "think")
    assert said in str(refused.value)


def test_a_template_may_name_fields_only():
    with pytest.raises(ValueError, match=r"from_answer='\{caption\}': \['caption'\]"):
        TargetConfig(from_answer="{caption}")
    with pytest.raises(ValueError, match=r"text_only_share \+ silent_clip_share = 1\.2"):
        TargetConfig(text_only_share=0.7, silent_clip_share=0.5)


def test_rows_hold_prompt_target_and_end_of_turn():
    tiny = tiny_audio_llm()
    problems = tiny_problems(tiny, num_prompts=2)
    rows = TargetRows(TargetConfig(form="plain"), "think", tiny.tokenizer)(problems)
    end = tiny.tokenizer.eos_token_id
    for row, problem in zip(rows, problems, strict=True):
        assert row.token_ids.tolist() == [*tiny.tokenizer.encode(problem.example.answer), end]
        assert row.prompt is problem.prompt


def test_a_tag_that_the_chat_template_opens_is_not_opened_again():
    tiny = tiny_audio_llm()
    rows = TargetRows(CONFIG, "think", tiny.tokenizer)
    opened = tiny.tokenizer.encode("what <think>")
    assert tiny.token_id("<think>") not in rows.ids(BARE, opened)
    assert rows.ids(BARE, opened) == rows.ids(BARE, tiny.tokenizer.encode("what"))[1:]


def test_hidden_shares_follow_the_place_in_the_whole_batch():
    tiny = tiny_audio_llm()
    problems = tiny_problems(tiny, num_prompts=2)
    config = TargetConfig(form="plain", text_only_share=0.25)
    targets = TargetRows(config, "think", tiny.tokenizer)
    rows = targets(problems)

    def heard(places):
        return [len(row.prompt.clips) for row in hide_clips(rows, places, 4, config, targets.special)]

    assert heard([0, 1]) == [0, 1] and heard([2, 3]) == [1, 1]
