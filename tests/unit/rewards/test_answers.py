"""Answers resolve to the choice they name, and to nothing where they name none or may name several."""

import json
from pathlib import Path

import pytest

from nemo_mapo.rewards.answers import extract_answer, normalise_answer, reasoning_words, resolve_choice

ANIMALS = ("dog barking", "cat meowing", "bird singing", "cow mooing")
VEHICLES = ("Train", "Automobile", "Aeroplane", "Horse-drawn wagon")
NUMBERS = ("1", "10", "100", "2")
NOTES = ("C", "C#", "D", "Db")
LETTERS = ("C", "D", "A", "B")


@pytest.mark.parametrize(
    ("answer", "choices", "index"),
    [
        ("cat meowing", ANIMALS, 1),
        ("  Cat   MEOWING. ", ANIMALS, 1),
        ('"cat meowing"', ANIMALS, 1),
        ("**cat meowing**.", ANIMALS, 1),
        ("\u201ccat meowing\u201d", ANIMALS, 1),
        ("B", ANIMALS, 1),
        ("b", ANIMALS, 1),
        ("B.", ANIMALS, 1),
        ("(b)", ANIMALS, 1),
        ("B)", ANIMALS, 1),
        ("[B]", ANIMALS, 1),
        ("**B**", ANIMALS, 1),
        ("B) cat meowing", ANIMALS, 1),
        ("**B)** cat meowing", ANIMALS, 1),
        ("(b) cat meowing", ANIMALS, 1),
        ("B. Cat meowing.", ANIMALS, 1),
        ("B: cat meowing", ANIMALS, 1),
        ("B - cat meowing", ANIMALS, 1),
        ("B ) cat meowing", ANIMALS, 1),
        ("answer: B", ANIMALS, 1),
        ("Answer: cat meowing", ANIMALS, 1),
        ("The answer is (B) cat meowing.", ANIMALS, 1),
        ("the correct answer is: B", ANIMALS, 1),
        ("So, the final answer is cat meowing", ANIMALS, 1),
        ("option B", ANIMALS, 1),
        ("Option B) cat meowing", ANIMALS, 1),
        ("A", VEHICLES, 0),
        ("B", VEHICLES, 1),
        ("horse-drawn wagon", VEHICLES, 3),
        ("1", NUMBERS, 0),
        ("10", NUMBERS, 1),
        ("10.", NUMBERS, 1),
        ("B) 10", NUMBERS, 1),
        ("C", NOTES, 0),
        ("C#", NOTES, 1),
        ("c#", NOTES, 1),
        ("D", NOTES, 2),
        ("Db", NOTES, 3),
        ("B", NOTES, 1),
        ("A", LETTERS, 2),
        ("a", LETTERS, 2),
        ("The answer is A.", LETTERS, 2),
        ("A) C", LETTERS, 0),
        ("major", ("A major", "major", "minor"), 1),
        ("A major", ("A major", "major", "minor"), 0),
        ("A-flat", ("G", "A-flat"), 1),
        ("m", ("M", "m"), 1),
        ("-5", ("5", "-5"), 1),
        ("dog", ("A) dog", "B) cat"), 0),
        ("B", ("A) dog", "B) cat"), 1),
        ("B) cat", ("A) dog", "B) cat"), 1),
        ("J. S. Bach", ("A. Vivaldi", "J. S. Bach"), 1),
        ("It's raining", ("It\u2019s raining", "It's snowing"), 0),
        ("'yes'", ("'yes'", "yes"), 0),
        ("cafe\u0301", ("bar", "caf\u00e9"), 1),
    ],
)
def test_an_answer_names_its_choice_by_text_letter_or_both(answer: str, choices: tuple[str, ...], index: int):
    assert resolve_choice(answer, choices) == index


@pytest.mark.parametrize(
    ("answer", "choices"),
    [
        (None, ANIMALS),
        ("", ANIMALS),
        ("   \n", ANIMALS),
        (".", ANIMALS),
        ("cat", ANIMALS),  # part of a text
        ("cat meowing loudly", ANIMALS),
        ("the cat meowing", ANIMALS),
        ("Auto", VEHICLES),
        ("Automobiles", VEHICLES),
        ("wagon", VEHICLES),
        ("1", ("10", "11", "12")),
        ("10", ("1", "100", "2")),
        ("1.0", NUMBERS),
        ("10%", NUMBERS),
        ("C", ("C#", "Db")),  # neither a text nor a letter in range
        ("E", ANIMALS),
        ("Z)", ANIMALS),
        ("B) dog barking", ANIMALS),  # letter and text contradict
        ("(A) cat meowing", ANIMALS),
        ("B) cat", ANIMALS),
        ("A) A", LETTERS),
        ("(A)", LETTERS),  # first choice, or the choice that reads A?
        ("A B", ANIMALS),
        ("AB", ANIMALS),
        ("A, B", ANIMALS),
        ("A or B", ANIMALS),
        ("A and B", ANIMALS),
        ("B) cat meowing and C) bird singing", ANIMALS),
        ("cat meowing, dog barking", ANIMALS),
        ("B) cat meowing\nC) bird singing", ANIMALS),
        ("cat meowing cat meowing", ANIMALS),
        ("not B", ANIMALS),
        ("the answer is not B", ANIMALS),
        ("the answer is a cat", ANIMALS),
        ("answer:", ANIMALS),
        ("B", ()),
        ("dog", ("dog", "dog")),
        ("Dog!", ("dog", "dog?")),
        ("5", ("-5", "+5")),
        ("52", ("5\u00b2", "7")),
        ("2", ("two", "three")),
    ],
)
def test_an_answer_that_names_none_or_several_resolves_to_nothing(answer: str | None, choices: tuple[str, ...]):
    assert resolve_choice(answer, choices) is None


LABELLED = [json.loads(line) for line in Path(__file__).with_name("labelled_answers.jsonl").read_text().splitlines()]
"""Answers with what people read in them: `names` is the index of the choice, or null for none or several."""
MAX_FALSE_REJECTS = 0.02


def test_the_labelled_answers_are_many_and_of_five_languages():
    assert len(LABELLED) >= 200 and len({row["language"] for row in LABELLED}) >= 5


@pytest.mark.parametrize("row", LABELLED, ids=lambda row: f"{row['language']}-{row['answer']}")
def test_every_answer_is_read_as_people_read_it(row: dict):
    assert resolve_choice(row["answer"], row["choices"]) in (row["names"], None)


def test_few_answers_that_people_understand_are_rejected():
    understood = [row for row in LABELLED if row["names"] is not None]
    rejected = [row["answer"] for row in understood if resolve_choice(row["answer"], row["choices"]) is None]
    assert len(rejected) <= MAX_FALSE_REJECTS * len(understood), rejected


def test_every_choice_resolves_to_itself_and_to_its_letter():
    for choices in (ANIMALS, VEHICLES, NUMBERS, NOTES):
        for index, choice in enumerate(choices):
            assert resolve_choice(choice, choices) == index
            assert resolve_choice(f"{'ABCD'[index]}) {choice}", choices) == index


@pytest.mark.parametrize(
    ("text", "plain"),
    [("  A  b\tC ", "a b c"), ('"Rock."', "rock"), ("U.S.", "u.s"), ("?", "?"), ("**x**!", "x"), ("**", "**")],
)
def test_normalising_keeps_all_that_tells_answers_apart(text: str, plain: str):
    assert normalise_answer(text) == plain


@pytest.mark.parametrize(
    ("text", "template", "answer"),
    [
        ("<think>x</think> B ", "think", "B"),
        ("x</think>\nB", "think", "B"),
        ("<think>x</think>", "think", None),
        ("<think>x</think>  \n", "think", None),
        ("<think>x B", "think", None),
        ("B", "think", None),
        ("", "think", None),
        ("<think>x</think>A</think>B", "think", None),
        ("<think>x</think><think>y", "think", None),
        ("<think>x</think> <answer> B </answer>", "think", "B"),
        ("<think>x</think><answer>A</answer><answer>B</answer>", "think", None),
        ("<think>x</think><answer>B", "think", None),
        ("<think>x</think>\n<answer>B</answer>", "think_answer", "B"),
        ("x</think><answer>B</answer>", "think_answer", "B"),
        ("<think>x</think>B", "think_answer", None),
        ("<think>x <answer>B</answer>", "think_answer", None),
        ("<think>x</think><answer>A</answer><answer>B</answer>", "think_answer", None),
        ("<reasoning>x</reasoning><answer> B </answer>", "reasoning", "B"),
        ("<answer>B</answer>", "reasoning", "B"),
        ("<reasoning>x</reasoning><answer></answer>", "reasoning", None),
        ("<reasoning>x</reasoning><answer>B", "reasoning", None),
        ("<reasoning>x</reasoning>B", "reasoning", None),
        ("<reasoning>x</reasoning><answer>A</answer><answer>B</answer>", "reasoning", None),
        ("<reasoning>x <answer>B</answer>", "reasoning", None),
        ("<reasoning>x <answer>B</answer> y</reasoning>", "reasoning", None),
        ("</answer><answer>B", "reasoning", None),
    ],
)
def test_the_one_answer_is_extracted(text: str, template: str, answer: str | None):
    assert extract_answer(text, template) == answer  # type: ignore[arg-type]


def test_a_completion_truncated_at_the_limit_has_no_answer_unless_the_answer_is_closed():
    assert extract_answer("<think>x</think>1", "think", finished=False) is None
    assert extract_answer("<reasoning>x</reasoning><answer>10</answer>", "reasoning", finished=False) == "10"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("<think> i don't hear it. </think> low", 4),
        ("<reasoning>one two</reasoning><answer>three</answer>", 2),
        ("<think> cut off in", 3),
        ("<think></think> low", 0),
        ("", 0),
    ],
)
def test_reasoning_words_count_the_reasoning_only(text: str, count: int):
    assert reasoning_words(text) == count
