"""Claims sorted by a judge: both rates by hand, and replies that are no verdict."""

import json

import pytest

from nemo_mapo.evaluation.cafe import ClaimRules, Claims, parse_claims, read_reasoning, score_claims
from nemo_mapo.rewards.judge import OpenAIClient
from nemo_mapo.rewards.judged import Judge
from tests.chat_server import chat_reply, serve

__all__ = ["serve"]

RULES = ClaimRules(predicted=("matched", "hallucinated", "misused"), target=("matched", "missed"))
COUNTS = {"matched": 3, "hallucinated": 1, "misused": 0, "missed": 2, "neutral": 5}


def record(name):
    return {"id": name, "question": "which?", "answer": "dog", "caption": "a dog", "text": f"{name}: i hear a dog"}


def test_a_reply_is_five_whole_numbers():
    assert parse_claims(json.dumps(COUNTS)) == Claims(**COUNTS)


@pytest.mark.parametrize(
    "reply",
    [
        "matched: 3",
        "[3, 1, 0, 2, 5]",
        json.dumps({**COUNTS, "matched": -1}),
        json.dumps({**COUNTS, "matched": 1.5}),
        json.dumps({**COUNTS, "matched": True}),
        json.dumps({name: COUNTS[name] for name in ("matched", "missed")}),
        json.dumps({**COUNTS, "more": 1}),
        f"```json\n{json.dumps(COUNTS)}\n```",
    ],
)
def test_anything_else_is_no_verdict(reply):
    assert parse_claims(reply) is None


def test_both_rates_are_those_of_all_claims(serve):
    replies = {"one": COUNTS, "two": {**dict.fromkeys(COUNTS, 0), "matched": 1, "misused": 3}, "three": "unsure"}

    def reply(path, body):
        asked = body["messages"][1]["content"]
        return chat_reply(next(json.dumps(value) for name, value in replies.items() if f"{name}: i hear" in asked))

    judge = Judge(OpenAIClient(serve(reply).config()), concurrency=2)
    results = score_claims([record(name) for name in replies], judge, "sort", RULES)
    # (3 + 1) of (3 + 1 + 0) + (1 + 0 + 3); 2 of (3 + 2) + (1 + 0).
    assert results["perception_accuracy"]["rate"] == pytest.approx(4 / 8)
    assert results["omission_rate"]["rate"] == pytest.approx(2 / 6)
    assert results["perception_accuracy"]["mean_of_completions"] == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert (results["completions"], results["unjudged"]) == (3, 1)


def test_without_a_claim_there_is_no_rate(serve):
    judge = Judge(OpenAIClient(serve(lambda path, body: (500, "")).config(max_attempts=1)), concurrency=1)
    results = score_claims([record("one")], judge, "sort", RULES)
    assert results["perception_accuracy"] is None and results["unjudged"] == 1


@pytest.mark.parametrize(
    "rules",
    [{"predicted": ("hallucinated",), "target": ("missed",)}, {"predicted": ("matched", "x"), "target": ("missed",)}],
)
def test_rules_name_known_kinds(rules):
    with pytest.raises(ValueError, match="predicted="):
        ClaimRules(**rules)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "jsonl:2: not a JSON line"),
        ("{}", "jsonl: item 2: field 'id'"),
        (json.dumps({**record("b"), "caption": " "}), r"jsonl: item 2 \(id 'b'\): field 'caption'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "reasoning.jsonl"
    path.write_text(json.dumps(record("a")) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"reasoning.{said}"):
        list(read_reasoning(path))


def test_an_id_is_used_once(tmp_path):
    path = tmp_path / "reasoning.jsonl"
    path.write_text(2 * (json.dumps(record("a")) + "\n"))
    with pytest.raises(ValueError, match="'a', which item 1 has already"):
        list(read_reasoning(path))
