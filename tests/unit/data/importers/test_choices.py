import pytest

from nemo_mapo.data.importers.base import InvalidRecord, Row
from nemo_mapo.data.importers.choices import answer_choice, draw, randomness, shuffled, split_options


@pytest.mark.parametrize(
    ("prompt", "question", "choices"),
    [
        ("<sound>\nWhich? (A) one. (B) two.", "Which?", ("one", "two")),
        ("Which?\nChoices:\nA. one\nB. two, or more\nC. three", "Which?", ("one", "two, or more", "three")),
        ("Which?\nA) one\nB) two\nThink first.", "Which?", ("one", "two")),
        ("Which? Please choose the answer from the following options: ['x', 'y].'].", "Which?", ("x", "y].")),
        ("Is (A) before (B)? Select one.\n(A) yes\n(B) no", "Is (A) before (B)?", ("yes", "no")),
        ("Which?\n(A) yes\n(B) no\nAnswer (A) or (B).", "Which?", ("yes", "no")),
        ("Which? (A) yes (B) no. Answer (A) or (B).", "Which? (A) yes (B) no. Answer (A) or (B).", ()),
        ("Which? (A) yes (C) no", "Which? (A) yes (C) no", ()),
        ("Select the instrument that plays.\n(A) lute\n(B) oud", "Select the instrument that plays.", ("lute", "oud")),
        ("Describe it.", "Describe it.", ()),
        ("Note A. is played.", "Note A. is played.", ()),
    ],
)
def test_question_and_choices_are_read_out_of_a_prompt(prompt, question, choices):
    assert split_options(prompt) == (question, choices)


@pytest.mark.parametrize(
    ("answer", "choice"),
    [(0, "C"), (1, "C#"), ("C", "C"), ("C#", "C#"), ("(B) C#", "C#"), ("<answer>B</answer>", "C#"), ("c#.", "C#")],
)
def test_an_answer_is_an_index_a_letter_or_a_text(answer, choice):
    assert answer_choice(Row(where="f:1", number=1, fields={"answer": answer}), "answer", ["C", "C#"]) == choice


@pytest.mark.parametrize("answer", ["C# minor", "D", 2, -1, True, 1.0, ["C"]])
def test_an_answer_that_names_no_choice_is_refused(answer):
    with pytest.raises(InvalidRecord, match="f:1: field 'answer'"):
        answer_choice(Row(where="f:1", number=1, fields={"answer": answer}), "answer", ["C", "C#"])


def test_a_number_that_may_be_index_or_text_is_refused_unless_the_corpus_counts_from_zero():
    row = Row(where="f:1", number=1, fields={"answer": 1})
    assert answer_choice(row, "answer", ["0", "1"]) == "1"
    assert answer_choice(row, "answer", ["1", "2"], counts_from_zero=True) == "2"
    with pytest.raises(InvalidRecord, match="or several"):
        answer_choice(row, "answer", ["1", "2"])


def test_drawn_choices_are_distinct_allowed_and_the_same_for_the_same_seed():
    pool = list("abcdefaa")
    drawn = [draw(pool, 3, randomness(0, str(name)), lambda one: one != "b") for name in range(50)]
    assert all(len(set(one)) == 3 and "b" not in one for one in drawn)
    assert {letter for one in drawn for letter in one} == set("acdef")
    assert drawn[7] == draw(pool, 3, randomness(0, "7"), lambda one: one != "b")
    assert drawn != [draw(pool, 3, randomness(1, str(name)), lambda one: one != "b") for name in range(50)]


def test_fewer_are_drawn_where_there_are_no_more():
    assert sorted(draw(["a", "b", "a"], 3, randomness(0, "x"), lambda _: True)) == ["a", "b"]


def test_the_right_choice_stands_in_every_place():
    places = {shuffled("right", ["x", "y", "z"], randomness(0, str(name))).index("right") for name in range(50)}
    assert places == {0, 1, 2, 3}
