"""The client of judge and encoder: what it sends, when it tries again, and that an outage is an error."""

import socket
import time

import pytest

from nemo_mapo.config.rewards import JudgeConfig
from nemo_mapo.evaluation.benchmarks.open_ended import read_ratings
from nemo_mapo.rewards.judge import ChatModel, EmbeddingModel, JudgeError, OpenAIClient
from tests.unit.evaluation.benchmarks.conftest import chat_reply, ratings


def test_a_chat_request_has_the_shape_of_the_interface(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    server = serve(lambda path, body: chat_reply("fine"))
    client = OpenAIClient(server.config(temperature=0.1, max_tokens=9, api_key_variable="MY_KEY"))
    assert isinstance(client, ChatModel) and isinstance(client, EmbeddingModel) and client.name == "judge"
    assert client.chat("be fair", "grade this") == "fine"
    assert server.requests == [
        (
            "/v1/chat/completions",
            {
                "model": "judge",
                "messages": [{"role": "system", "content": "be fair"}, {"role": "user", "content": "grade this"}],
                "temperature": 0.1,
                "max_tokens": 9,
            },
            "Bearer secret",
        )
    ]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_fault_is_tried_again(serve, status):
    replies = iter([(status, ""), (status, ""), chat_reply("fine")])
    server = serve(lambda path, body: next(replies))
    assert OpenAIClient(server.config(max_attempts=3)).chat("", "x") == "fine"


def test_attempts_are_bounded(serve):
    server = serve(lambda path, body: (503, ""))
    with pytest.raises(JudgeError, match=r"3 attempts failed, the last with: .*status 503"):
        OpenAIClient(server.config(max_attempts=3)).chat("", "x")
    assert len(server.requests) == 3


def test_a_refusal_is_not_tried_again(serve):
    server = serve(lambda path, body: (404, {"error": "no such model"}))
    with pytest.raises(JudgeError, match=r"status 404: .*no such model"):
        OpenAIClient(server.config()).chat("", "x")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((200, "<html>"), "not JSON"),
        ((200, {"choices": []}), "no chat completion"),
        ((200, {"choices": [{"message": {"content": None}}]}), "not a text"),
    ],
)
def test_an_answer_of_another_kind_is_an_error(serve, reply, said):
    with pytest.raises(JudgeError, match=said):
        OpenAIClient(serve(lambda path, body: reply).config()).chat("", "x")


@pytest.mark.parametrize(
    "data", [None, [{"index": 0}], [{"index": 0, "embedding": [1.0]}], [{"index": 0, "embedding": ["x"]}] * 2]
)
def test_embeddings_of_another_kind_are_an_error(serve, data):
    client = OpenAIClient(serve(lambda path, body: (200, {"data": data})).config(embedding_model="encoder"))
    with pytest.raises(JudgeError, match="embeddings"):
        client.embed(["one", "two"])


def test_a_server_that_is_not_there_is_an_error():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    config = JudgeConfig(base_url=address, model="judge", max_attempts=2, pause_seconds=0)
    with pytest.raises(JudgeError, match="2 attempts failed"):
        OpenAIClient(config).chat("", "x")


def test_a_server_that_does_not_answer_in_time_is_an_error(serve):
    def slow(path, body):
        time.sleep(0.5)
        return chat_reply("late")

    config = serve(slow).config(timeout_seconds=0.1, max_attempts=2)
    with pytest.raises(JudgeError, match="no complete answer within"):
        OpenAIClient(config).chat("", "x")


@pytest.mark.parametrize(
    ("changes", "call", "said"),
    [
        ({"base_url": None}, lambda client: None, r"judge\.base_url"),
        ({"model": None}, lambda client: client.chat("", ""), r"judge\.model"),
        ({}, lambda client: client.embed(["x"]), r"judge\.embedding_model"),
    ],
)
def test_what_is_not_named_is_asked_for(changes, call, said):
    with pytest.raises(ValueError, match=said):
        call(OpenAIClient(JudgeConfig(**{"base_url": "http://localhost/v1", "model": "judge", **changes})))


def test_ratings_are_read_from_the_five_lines():
    found = read_ratings("Here you are:\n" + ratings(4, 5, 3, 4, 4.25))
    assert found == {"correctness": 4, "relevance": 5, "completeness": 3, "clarity": 4, "overall": 4.25}
    starred = "**CORRECTNESS:** 4 - a\n- Relevance: [5]\nCOMPLETENESS: 3\nCLARITY: 4/5\n**OVERALL**: 4.0 - good"
    assert read_ratings(starred) == {"correctness": 4, "relevance": 5, "completeness": 3, "clarity": 4, "overall": 4}


@pytest.mark.parametrize(
    "reply",
    [
        "",
        ratings(4, 5, 3, 4, 4).replace("CLARITY: 4 - so\n", ""),
        ratings(4, 5, 3, 4, 6),
        ratings(0, 5, 3, 4, 4),
        ratings(4, 5, 3, 4, 4) + "\nOVERALL: 5",
        ratings(4, 5, 3, 4, 4).replace("OVERALL: 4", "OVERALL: four"),
        ratings(4, 5, 3, 4, 4).replace("OVERALL: 4", "OVERALL: -4"),
    ],
)
def test_a_rating_that_is_not_there_is_not_made_up(reply):
    assert read_ratings(reply) is None
