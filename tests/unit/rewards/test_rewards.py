"""What earns each reward, and how they add up."""

import re

import numpy as np
import pytest

from nemo_mapo.config.rewards import AccuracyTerm, ConsistencyTerm, FormatTerm, RewardsConfig
from nemo_mapo.embedded.synthetic_text import ATTRIBUTES, COUNT_WORDS, KINDS, Event, question_text, reasoning_text
from nemo_mapo.rewards.accuracy import AccuracyReward
from nemo_mapo.rewards.combined import build_rewards, score
from nemo_mapo.rewards.consistency import RuleConsistency
from nemo_mapo.rewards.format import FormatReward
from nemo_mapo.rewards.protocol import Reward, RewardSample
from nemo_mapo.types import Example

SWEEPS = ("rising", "falling", "peaking", "dipping")
THINK = RewardsConfig()
REASONING = RewardsConfig(template="reasoning")
GOOD = "<think> i hear a low tone, then a peaking sweep. so the sweep seems peaking. </think> peaking"


def sample(text: str, choices: tuple[str, ...] = SWEEPS, answer: str | None = None, finished: bool = True):
    right = answer if answer is not None else choices[2]
    example = Example(id="x", question="how does the sweep sound?", choices=choices, answer=right, task="attribute")
    return RewardSample(text=text, example=example, finished=finished, num_tokens=len(text.split()))


def weighted(accuracy: float = 2.0, format: float = 1.0, consistency: float = 1.0) -> RewardsConfig:
    terms = {
        "accuracy": AccuracyTerm(weight=accuracy),
        "format": FormatTerm(weight=format),
        "consistency": ConsistencyTerm(weight=consistency),
    }
    return RewardsConfig(terms=terms)


def thinking(conclusion: str, answer: str = "peaking") -> str:
    return f"<think> {conclusion} </think> {answer}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (GOOD, 1.0),
        ("<think>x</think> C) peaking", 1.0),
        ("<think>x</think> rising", 0.0),
        ("<think>x</think> peak", 0.0),
        ("<think>so it seems peaking</think>", 0.0),
        ("peaking", 0.0),
    ],
)
def test_accuracy_needs_the_right_choice_as_answer(text: str, value: float):
    assert AccuracyReward(THINK)([sample(text)]) == [value]


def test_accuracy_never_matches_by_a_prefix():
    reward = AccuracyReward(THINK)
    assert reward([sample("<think>x</think> A", ("Train", "Automobile"), "Automobile")]) == [0.0]
    assert reward([sample("<think>x</think> 1", ("1", "10"), "10")]) == [0.0]
    assert reward([sample("<think>x</think> 10", ("1", "10"), "1")]) == [0.0]


def test_accuracy_gives_nothing_to_an_answer_truncated_at_the_limit():
    assert AccuracyReward(THINK)([sample("<think>x</think> 1", ("1", "10"), "1", finished=False)]) == [0.0]


def test_accuracy_refuses_an_example_without_a_right_choice():
    with pytest.raises(ValueError, match="not among the choices"):
        AccuracyReward(THINK)([sample(GOOD, SWEEPS, "wobbling")])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (GOOD, 1.0),
        ("\n<think>\nx\n</think>\n\npeaking\n", 1.0),
        ("<think>x</think>peaking and more", 1.0),
        ("ok <think>x</think> peaking", 0.0),
        ("x</think> peaking", 0.0),
        ("<think>x peaking", 0.0),
        ("<think></think> peaking", 0.0),
        ("<think> \n </think> peaking", 0.0),
        ("<think> ... </think> peaking", 0.0),
        ("<think>x</think>", 0.0),
        ("<think>x</think> .", 0.0),
        ("</think>x<think> peaking", 0.0),
        ("<think><think>x</think> peaking", 0.0),
        ("<think>x</think></think> peaking", 0.0),
        ("<think>x</think> a <think>y</think> peaking", 0.0),
        ("<Think>x</Think> peaking", 0.0),
        ("<think >x</think> peaking", 0.0),
        ("<think>x</think><answer>peaking</answer>", 0.0),
        ("<reasoning>x</reasoning><answer>peaking</answer>", 0.0),
        ("peaking", 0.0),
        ("", 0.0),
    ],
)
def test_the_think_format_is_kept_strictly(text: str, value: float):
    assert FormatReward(THINK)([sample(text)]) == [value]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<reasoning>x</reasoning><answer>peaking</answer>", 1.0),
        (" <reasoning>\nx\n</reasoning>\n<answer>\npeaking\n</answer>\n", 1.0),
        ("so <reasoning>x</reasoning><answer>peaking</answer>", 0.0),
        ("<reasoning>x</reasoning> so <answer>peaking</answer>", 0.0),
        ("<reasoning>x</reasoning><answer>peaking</answer> done", 0.0),
        ("<reasoning></reasoning><answer>peaking</answer>", 0.0),
        ("<reasoning>x</reasoning><answer> </answer>", 0.0),
        ("<reasoning>x</reasoning><answer>peaking", 0.0),
        ("<reasoning>x</reasoning>peaking", 0.0),
        ("<answer>peaking</answer><reasoning>x</reasoning>", 0.0),
        ("<reasoning>x<answer>peaking</answer></reasoning>", 0.0),
        ("<reasoning>x</reasoning><answer>a</answer><answer>peaking</answer>", 0.0),
        ("<reasoning>x</reasoning><reasoning>y</reasoning><answer>peaking</answer>", 0.0),
        ("<reasoning><think>x</think></reasoning><answer>peaking</answer>", 0.0),
        ("<think>x</think> peaking", 0.0),
    ],
)
def test_the_reasoning_format_is_kept_strictly(text: str, value: float):
    assert FormatReward(REASONING)([sample(text)]) == [value]


def test_a_truncated_completion_fails_format_and_consistency():
    cut = sample(GOOD, finished=False)
    assert FormatReward(THINK)([cut]) == [0.0]
    assert RuleConsistency(THINK)([cut]) == [0.0]


@pytest.mark.parametrize(
    "conclusion",
    [
        "so the sweep seems peaking.",
        "so the sweep seems peaking",
        "So, the sweep is Peaking!",
        "is it rising? no. is it falling? no. is it peaking? yes. is it dipping? no. so the sweep seems peaking.",
        "is it rising? yes. wait, it comes back down. so the sweep seems peaking.",
        "rising? no. falling? no. peaking? yes. dipping? no.",
        "the choices are rising, falling, peaking and dipping. the sweep is peaking.",
        "is it rising or falling? the sweep is peaking.",
        "it seems peaking, not rising.",
        "it is not rising but peaking.",
        "it is peaking rather than dipping.",
        "neither rising nor falling fits. it is peaking.",
        "between rising and peaking, peaking fits better.",
        "no doubt it is peaking.",
        "it is peaking. it is not falling. rising is ruled out.",
        "so the answer is C.",
        "so the answer is (C) peaking.",
        "so option C fits.",
        "the sweep is peaking at 1.5 s. that settles it.",
        "it goes up ... and down again.\nso the sweep seems peaking.",
    ],
)
def test_thinking_that_concludes_with_the_answer_is_consistent(conclusion: str):
    assert RuleConsistency(THINK)([sample(thinking(conclusion))]) == [1.0]


@pytest.mark.parametrize(
    "conclusion",
    [
        "so the sweep seems rising.",
        "the sweep is peaking. so the sweep seems rising.",
        "so the sweep seems peaking. wait, it is rising.",
        "so the sweep seems peaking or rising.",
        "so the sweep seems peaking and rising.",
        "so the sweep is not peaking.",
        "so the sweep isn't peaking.",
        "the sweep is peaking. but no, peaking is wrong.",
        "so peaking is unlikely.",
        "is it peaking? no. so the sweep seems",
        "peaking? no.",
        "is it peaking?",
        "i hear a low tone. the question asks about the sweep.",
        "the choices are rising, falling, peaking and dipping.",
        "so the sweep seems",
        "so the sweep seems peaking because",
        "so the sweep seems peaking,",
        "so the sweep seems peaking ...",
        "so the sweep seems speaking.",
        "so the sweep seems self-peaking.",
        "so the answer is B.",
        "so the answer is (A) peaking.",
        "",
    ],
)
def test_thinking_that_concludes_otherwise_or_breaks_off_is_not(conclusion: str):
    assert RuleConsistency(THINK)([sample(thinking(conclusion))]) == [0.0]


@pytest.mark.parametrize(
    ("text", "choices", "value"),
    [
        (thinking("so it is C#.", "C#"), ("C", "C#", "D"), 1.0),
        (thinking("so it is C#.", "C"), ("C", "C#", "D"), 0.0),
        (thinking("so there are 10 beeps.", "10"), ("1", "10", "2"), 1.0),
        (thinking("so there are 10 beeps.", "1"), ("1", "10", "2"), 0.0),
        (thinking("so it takes 1.5 seconds.", "1"), ("1", "5", "2"), 0.0),
        (thinking("so it is low and steady.", "low and steady"), ("low", "low and steady", "high"), 1.0),
        (thinking("so it is low and steady.", "low"), ("low", "low and steady", "high"), 0.0),
        (thinking("so it is slow.", "low"), ("slow", "low", "high"), 0.0),
        (thinking("so the key is A.", "A"), ("A", "B", "C"), 1.0),
        (thinking("so it is a bell.", "A"), ("A", "B", "C"), 0.0),
        (thinking("so the tone seems first.", "tone"), ("sweep", "noise", "tone", "pulse"), 1.0),
        (thinking("i hear a low tone. so the pulse seems first.", "tone"), ("sweep", "noise", "tone", "pulse"), 0.0),
        (thinking("so it is rising.", "none of them"), SWEEPS, 0.0),
        (thinking("so it is rising.", ""), SWEEPS, 0.0),
        ("so the sweep seems peaking.</think> peaking", SWEEPS, 1.0),  # the opening tag may be in the prompt
        ("<think>so the sweep seems peaking. peaking", SWEEPS, 0.0),
    ],
)
def test_consistency_reads_whole_choices(text: str, choices: tuple[str, ...], value: float):
    assert RuleConsistency(THINK)([sample(text, choices, choices[0])]) == [value]


@pytest.mark.parametrize("kind", KINDS)
def test_every_belief_of_the_synthetic_template_is_consistent_with_itself_and_with_no_other(kind: str):
    heard = [
        Event(kind=other, attribute=words[0], start_seconds=float(rank), duration_seconds=0.5, loudness=-10.0 * rank)
        for rank, (other, words) in enumerate(ATTRIBUTES.items())
    ]
    asked = {("attribute", kind): ATTRIBUTES[kind], ("order", "last"): KINDS, ("loudness", ""): KINDS}
    for (task, subject), choices in (asked | {("count", ""): COUNT_WORDS}).items():
        example = Example(id=task, question=question_text(task, subject), choices=choices, answer=choices[0], task=task)
        for belief in choices:
            text = reasoning_text(heard, example, belief, np.random.default_rng(0))
            thought, _, _ = text.partition("</think>")
            for answer in choices:
                given = RewardSample(text=f"{thought}</think> {answer}", example=example, finished=True, num_tokens=9)
                assert RuleConsistency(THINK)([given]) == [float(answer == belief)]
                assert FormatReward(THINK)([given]) == [1.0]
                assert AccuracyReward(THINK)([given]) == [float(answer == example.answer)]


def test_consistency_does_not_ask_for_the_truth():
    wrong = thinking("so the sweep seems rising.", "rising")
    assert RuleConsistency(THINK)([sample(wrong)]) == [1.0]
    assert AccuracyReward(THINK)([sample(wrong)]) == [0.0]


def test_consistency_reads_the_reasoning_template():
    text = "<reasoning>so the sweep seems peaking.</reasoning><answer>peaking</answer>"
    assert RuleConsistency(REASONING)([sample(text)]) == [1.0]
    assert RuleConsistency(REASONING)([sample(text.replace("peaking.", "rising."))]) == [0.0]


def test_the_total_weighs_accuracy_twice():
    wrong = thinking("so the sweep seems rising.", "rising")
    contradictory = thinking("so the sweep seems rising.", "peaking")
    table = score([sample(GOOD), sample(wrong), sample(contradictory), sample("peaking")], THINK)
    assert table.by_reward == {
        "accuracy": [1.0, 0.0, 1.0, 0.0],
        "format": [1.0, 1.0, 1.0, 0.0],
        "consistency": [1.0, 1.0, 0.0, 0.0],
    }
    assert table.total == [4.0, 2.0, 3.0, 0.0]
    assert table.accuracy == [1.0, 0.0, 1.0, 0.0]


def test_weights_come_from_the_config_and_a_weightless_reward_is_not_computed():
    table = score([sample(GOOD)], weighted(accuracy=0.5, format=3.0, consistency=0.0))
    assert table.total == [3.5]
    assert set(table.by_reward) == {"accuracy", "format"}


def test_accuracy_is_known_even_without_weight():
    table = score([sample(GOOD)], weighted(accuracy=0.0, consistency=0.0))
    assert (table.total, table.accuracy) == ([1.0], [1.0])


def test_no_samples_give_an_empty_table():
    table = score([], THINK)
    assert (table.total, table.accuracy) == ([], [])


def test_accuracy_is_known_even_without_an_entry():
    table = score([sample(GOOD)], RewardsConfig(terms={"format": FormatTerm(weight=1.0)}))
    assert (table.total, table.accuracy) == ([1.0], [1.0])


def test_what_has_a_weight_is_built_under_its_name():
    built = build_rewards(weighted(format=0.0))
    assert list(built) == ["accuracy", "consistency"] == list(weighted(format=0.0).weights)
    for name, reward in built.items():
        assert isinstance(reward, Reward) and reward.name == name


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"style": {"type": "style", "weight": 1}}, "'style'"),
        ({"accuracy": {"weight": 1}}, "type"),
        ({"right": {"type": "accuracy", "weight": 1}}, "write terms.accuracy"),
        ({"accuracy": {"type": "accuracy", "weight": -1}}, "greater than or equal to 0"),
        ({"perception": {"type": "perception", "weight": 1}}, "needs template=mpar2"),
        ({"reasoning_steps": {"type": "reasoning_steps", "weight": 1, "step_share": 1}}, "step_floor"),
    ],
)
def test_an_entry_that_names_no_reward_or_lacks_a_value_is_refused(terms, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RewardsConfig(terms=terms)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"accuracy": 2.0}, "accuracy is now rewards.terms.accuracy.weight"),
        ({"perception": 1.0}, "perception is now rewards.terms.perception.weight"),
        ({"consistency_judge": "model"}, "consistency_judge is now rewards.terms.consistency.decided_by"),
        ({"conditional_on_correct": True}, "is now rewards.terms.consistency.conditional_on_correct"),
        ({"mpar2": {"review_bonus": 1}}, "mpar2 is now rewards.terms.reviewed_answer.review_bonus"),
    ],
)
def test_a_key_of_earlier_versions_is_answered_with_the_new_one(old, new):
    with pytest.raises(ValueError, match=re.escape(new)):
        RewardsConfig(**old)
