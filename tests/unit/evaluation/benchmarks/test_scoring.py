"""Scores by hand: strict matching, any order of choices, every item counted."""

import itertools

import pytest

from nemo_mapo.evaluation.benchmarks.open_ended import OpenEndedJudge
from nemo_mapo.evaluation.benchmarks.predictions import Prediction
from nemo_mapo.evaluation.benchmarks.scoring import NearestChoice, Scorer, named_choice, read_answer
from nemo_mapo.rewards.judge import JudgeError, OpenAIClient
from tests.unit.evaluation.benchmarks.conftest import chat_reply, ratings
from tests.unit.evaluation.benchmarks.published import (
    answers,
    instruction_record,
    loaded,
    mmar_record,
    mmau_pro_record,
    mmau_record,
    mmsu_record,
    open_record,
)


def verdicts(scores):
    return [(score.id, score.value, score.status) for score in scores]


def item_of(tmp_path, layout, record, **options):
    (item,) = loaded(tmp_path / "one.json", layout, [record], **options).items
    return item


def test_every_item_is_counted_whatever_was_predicted(tmp_path):
    benchmark = loaded(tmp_path / "mmau.json", "mmau", [mmau_record(name) for name in "abcdef"])
    predictions = answers(a="Dog", b="(A)", c="Cat", d="Dogs", e="")
    assert verdicts(Scorer(benchmark, template="none")(predictions)) == [
        ("a", 1.0, "answered"),
        ("b", 1.0, "answered"),
        ("c", 0.0, "answered"),
        ("d", 0.0, "unparsable"),
        ("e", 0.0, "unparsable"),
        ("f", 0.0, "missing"),
    ]


def test_the_answer_is_read_out_of_the_template():
    whole = Prediction(id="a", completion="<think>it barks</think> Dog")
    assert read_answer(whole, "think") == "Dog"
    assert read_answer(whole, "none") == "<think>it barks</think> Dog"
    assert read_answer(Prediction(id="a", completion="<think>it barks</think> Do", finished=False), "think") is None
    tagged = Prediction(id="a", completion="<reasoning>it barks</reasoning><answer>Dog</answer>")
    assert read_answer(tagged, "reasoning") == "Dog"


def test_any_order_of_the_choices_gives_the_same_score(tmp_path):
    item = item_of(tmp_path, "mmau", mmau_record("a"))
    for order in itertools.permutations(item.choices):
        letter = "ABCD"[order.index("Dog")]
        assert named_choice("Dog", item, order) == "Dog"
        assert named_choice(letter, item, order) == "Dog"
        assert named_choice(f"({letter}) Dog", item, order) == "Dog"


def test_letters_of_mmsu_count_from_the_published_places(tmp_path):
    item = item_of(tmp_path, "mmsu", mmsu_record("a"))
    assert named_choice("D", item, None) == "female" and named_choice("B", item, None) == "male"
    assert named_choice("A", item, None) is None, "an empty place is no choice"
    assert named_choice("B", item, ("male", "female")) == "female", "but where two were shown, B is the second"


def test_a_choice_that_is_listed_twice_is_one_choice_with_two_letters(tmp_path):
    item = item_of(tmp_path, "mmau", mmau_record("a", choices=["Dog", "Cat", "Dog"]))
    assert [named_choice(answer, item, None) for answer in ("Dog", "A", "C", "B")] == ["Dog", "Dog", "Dog", "Cat"]


def test_an_item_without_a_right_choice_is_wrong_unless_its_answer_is_spelled_out(tmp_path):
    records = [mmar_record(name, answer="On a ship, at sea") for name in "abc"]
    benchmark = loaded(tmp_path / "mmar.json", "mmar", records, keep_defective=True)
    scores = Scorer(benchmark, template="none")(answers(a="On a ship, at sea.", b="At sea", c="Somewhere"))
    assert verdicts(scores) == [("a", 1.0, "answered"), ("b", 0.0, "answered"), ("c", 0.0, "unparsable")]


def test_instructions_are_checked_on_the_answer_alone(tmp_path):
    records = [instruction_record(name, "No Commas", {}) for name in "abc"]
    benchmark = loaded(tmp_path / "pro.json", "mmau_pro", records)
    predictions = answers(a="<think>one, two</think>rain and wind", b="<think>one</think>rain, wind")
    assert verdicts(Scorer(benchmark, template="think")(predictions)) == [
        ("a", 1.0, "answered"),
        ("b", 0.0, "answered"),
        ("c", 0.0, "missing"),
    ]


@pytest.fixture
def open_benchmark(tmp_path):
    return loaded(tmp_path / "pro.json", "mmau_pro", [open_record(name) for name in "abc"])


def judge(server, file=None, **changes):
    return OpenEndedJudge(OpenAIClient(server.config(**changes)), file=file, attempts=2, concurrency=2)


def test_open_questions_score_the_judges_overall_rating_over_five(serve, open_benchmark):
    server = serve(lambda path, body: chat_reply(ratings(4, 5, 3, 4, 4)))
    scores = Scorer(open_benchmark, template="none", judge=judge(server))(answers(a="Tea is made.", b=" "))
    assert verdicts(scores) == [("a", 0.8, "answered"), ("b", 0.0, "unparsable"), ("c", 0.0, "missing")]
    ((_, body, _),) = server.requests
    prompt = body["messages"][-1]["content"]
    assert all(part in prompt for part in ("What is prepared?", "Somebody makes tea.", "Tea is made."))


def test_open_questions_without_a_judge_are_refused_before_anything_is_scored(open_benchmark):
    with pytest.raises(ValueError, match=r"judge\.base_url"):
        Scorer(open_benchmark, template="none")


def test_a_judge_that_gives_no_rating_is_an_error_not_a_score(serve, open_benchmark):
    server = serve(lambda path, body: chat_reply("CORRECTNESS: 4 - good"))
    with pytest.raises(JudgeError, match="item a: 2 replies of the judge lack a rating"):
        Scorer(open_benchmark, template="none", judge=judge(server))(answers(a="Tea"))
    assert len(server.requests) == 2


def test_a_judgement_is_kept_and_used_again_for_the_same_response_only(serve, open_benchmark, tmp_path):
    server = serve(lambda path, body: chat_reply(ratings(5, 5, 5, 5, 5)))
    file = tmp_path / "judgements.jsonl"
    for _ in range(2):
        scores = Scorer(open_benchmark, template="none", judge=judge(server, file))(answers(a="Tea", b="Soup"))
        assert [score.value for score in scores] == [1.0, 1.0, 0.0]
    assert len(server.requests) == 2 and len(file.read_text().splitlines()) == 2
    Scorer(open_benchmark, template="none", judge=judge(server, file))(answers(a="Coffee"))
    Scorer(open_benchmark, template="none", judge=judge(server, file, model="another"))(answers(a="Tea"))
    assert len(server.requests) == 4


def test_judgements_made_before_an_outage_are_kept(serve, open_benchmark, tmp_path):
    def reply(path, body):
        return (500, "") if "Soup" in body["messages"][-1]["content"] else chat_reply(ratings(5, 5, 5, 5, 5))

    file = tmp_path / "judgements.jsonl"
    with pytest.raises(JudgeError):
        Scorer(open_benchmark, template="none", judge=judge(serve(reply), file))(answers(a="Tea", b="Soup"))
    assert len(file.read_text().splitlines()) == 1


def test_the_nearest_embedding_names_the_choice(serve, tmp_path):
    vectors = {"a hot leaf drink": [1.0, 0.1], "Tea": [20.0, 0.0], "Soup": [0.0, 1.0], "Bread": [-1.0, 0.0]}

    def reply(path, body):
        rows = [{"index": index, "embedding": vectors[text]} for index, text in enumerate(body["input"])]
        return 200, {"data": rows[::-1]}

    benchmark = loaded(tmp_path / "pro.json", "mmau_pro", [mmau_pro_record(name) for name in "ab"])
    nearest = NearestChoice(OpenAIClient(serve(reply).config(embedding_model="encoder")))
    scores = Scorer(benchmark, template="none", names_choice=nearest)(answers(a="a hot leaf drink"))
    assert verdicts(scores) == [("a", 1.0, "answered"), ("b", 0.0, "missing")]


def test_withheld_answers_cannot_be_scored(tmp_path):
    benchmark = loaded(tmp_path / "test.json", "mmau", [mmau_record("a", answer="")])
    with pytest.raises(ValueError, match="withheld"):
        Scorer(benchmark, template="none")(answers(a="Dog"))
