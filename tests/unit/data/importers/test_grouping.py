"""Splits by group: whole groups, shares of questions, answers alike in each; and the leak that is said."""

from collections import Counter

import pytest

from nemo_mapo.data.importers.base import Source
from nemo_mapo.data.importers.grouping import Member, assign_splits, leaks
from tests.unit.data.importers.corpora import clip, cuts_of, write_lines
from tests.unit.data.importers.test_prepare import line

DIGITS = [str(digit) for digit in range(10)]


def counts(members, found):
    return Counter((found[member.group], member.answer) for member in members)


def test_answers_are_in_the_same_shares_in_every_split():
    members = [Member(group=f"{answer}-{n}", answer=answer) for answer in DIGITS for n in range(20)]
    found = counts(members, assign_splits(members, (0.8, 0.1, 0.1), seed=3))
    assert found == {(split, answer): n for answer in DIGITS for split, n in
                     (("train", 16), ("validation", 2), ("test", 2))}  # fmt: skip


def test_answers_that_occur_once_are_divided_by_the_shares_too():
    members = [Member(group=str(n), answer=f"sentence {n}") for n in range(1000)]
    found = assign_splits(members, (0.9, 0.05, 0.05), seed=0)
    assert Counter(found.values()) == {"train": 900, "validation": 50, "test": 50}


def test_a_group_is_in_one_split_whatever_its_answers():
    speakers = ("ann", "bob", "cat", "dan", "eve", "fay")
    members = [Member(group=speaker, answer=digit) for speaker in speakers for digit in DIGITS]
    found = assign_splits(members, (0.67, 0.165, 0.165), seed=0)
    assert Counter(found.values()) == {"train": 4, "validation": 1, "test": 1}
    tests = {assign_splits(members, (0.67, 0.165, 0.165), seed=seed)["ann"] for seed in range(20)}
    assert tests == {"train", "validation", "test"}


def test_a_small_share_of_few_groups_is_still_one_group():
    members = [Member(group=group, answer="a") for group in "abcd"]
    assert Counter(assign_splits(members, (0.9, 0.05, 0.05), seed=0).values()) == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }
    assert set(assign_splits(members, (1.0, 0.0, 0.0), seed=0).values()) == {"train"}


def test_the_order_of_the_lines_does_not_matter():
    members = [Member(group=f"{n}", answer=DIGITS[n % 10]) for n in range(60)]
    one = assign_splits(members, (0.8, 0.1, 0.1), seed=0)
    assert one == assign_splits(members[::-1], (0.8, 0.1, 0.1), seed=0)


def test_a_leak_is_counted_in_values_and_questions():
    rows = [("train", {"speaker": "ann"})] * 3 + [("test", {"speaker": "ann"}), ("test", {"speaker": "bob"})]
    (leak,) = leaks(rows)
    assert (leak.values, leak.shared, leak.questions) == (2, 1, {"train": 3, "test": 1})
    assert "1 of 2 values of 'speaker' ('ann', ...)" in leak.message() and "3 in train, 1 in test" in leak.message()
    assert leaks([("train", {"speaker": "ann"}), ("test", {"speaker": "bob"})]) == []


@pytest.fixture
def speakers(tmp_path):
    """Forty questions about forty clips of four speakers."""
    lines = [line(n, answer="ab"[n % 2], speaker="wxyz"[n // 10]) for n in range(40)]
    write_lines(tmp_path / "all.jsonl", lines)
    for number in range(40):
        clip(tmp_path / f"{number}.wav")
    return tmp_path / "all.jsonl"


def speakers_of(output, split):
    return {int(name[1:]) // 10 for name in cuts_of(output, split)}


def test_speakers_are_kept_apart_and_one_in_two_splits_is_said_with_numbers(speakers, run):
    shares = (0.5, 0.25, 0.25)
    report, output = run("multiple_choice", Source(path=speakers, group_by="speaker"), shares=shares)
    found = [speakers_of(output, split) for split in ("train", "validation", "test")]
    assert sorted(map(len, found)) == [1, 1, 2] and len(set.union(*found)) == 4
    assert report.leaks == [] and "warning" not in report.table()
    mixed, _ = run("multiple_choice", Source(path=speakers), shares=shares, output="mixed")
    assert "warning: 4 of 4 values of 'speaker'" in mixed.table()
    assert "20 in train, 10 in validation, 10 in test" in mixed.table()
    assert mixed.as_plain()["labels_in_several_splits"][0]["shared"] == 4


def test_a_line_without_the_group_is_refused_by_place(speakers, run):
    with pytest.raises(ValueError, match=r"all.jsonl:1: field 'accent', which --group-by names, is missing"):
        run("multiple_choice", Source(path=speakers, group_by="accent"))
