"""The taggers: which one is chosen, what it says, and how far the one without data agrees with the other."""

import logging
import socket
from pathlib import Path

import nltk
import pytest

from benchmarks.pos_agreement import TEXT, byte_level_tokenizer, measure, read_parts
from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.pos_gate import tagger as tagger_module
from nemo_mapo.pos_gate.tagger import (
    CHAIN_NAME,
    PERCEPTRON_PACKAGE,
    UNIVERSAL_TAGS,
    build_chain_tagger,
    build_tagger,
)
from nemo_mapo.pos_gate.words import sentences_of, word_parts

LEAST_AGREEMENT = 0.97  # measured 0.99 (docs/pos_gate.md); the issue asks for 0.95

needs_perceptron = pytest.mark.skipif(
    build_tagger(download=False).name != PERCEPTRON_PACKAGE,
    reason=f"NLTK data {PERCEPTRON_PACKAGE} is not installed (set NLTK_DATA to run this)",
)


@pytest.mark.parametrize(
    ("sentence", "tags"),
    [
        ("i hear a low tone", "PRON VERB DET ADJ NOUN"),
        ("so the sweep seems rising", "ADV DET NOUN VERB VERB"),
        ("it dips , so the sweep seems rising", "PRON VERB . ADP DET NOUN VERB VERB"),
        ("so loud", "ADV ADJ"),
        ("there is a hum .", "DET VERB DET NOUN ."),
        ("somebody is there", "NOUN VERB ADV"),
        ("about five seconds", "ADV NUM NOUN"),
        ("about the bell", "ADP DET NOUN"),
        ("the speaker 's voice", "DET NOUN PRT NOUN"),
        ("it 's not loud", "PRON VERB ADV ADJ"),
        ("first , then 1.5 seconds", "ADJ . ADV NUM NOUN"),
        ("Therefore It Was Pfft", "ADV PRON VERB X"),
        ("hissss clip-clop brrr high-pitched", "X X X ADJ"),
        ("resonation quietly bombastic blorped", "NOUN ADV ADJ VERB"),
        ("morning noise string", "NOUN NOUN NOUN"),
    ],
)
def test_the_chain_tags_without_any_data(sentence: str, tags: str):
    words = sentence.split()
    tagged = build_chain_tagger().tag(words)
    assert [word for word, _ in tagged] == words
    assert [tag for _, tag in tagged] == tags.split()


def test_every_word_gets_a_universal_tag_and_only_marks_get_the_mark_tag():
    words = ["$", "'s", "5%", "#3", "...", "-", "--", "&", "日本", "_", "'", '"', "n't"]
    for tagger in (build_chain_tagger(), build_tagger(download=False)):
        for word, tag in tagger.tag(words):
            assert tag in UNIVERSAL_TAGS
            assert (tag == ".") == (not any(character.isalnum() for character in word))


def test_without_data_and_with_a_network_that_hangs_the_chain_is_chosen_quietly_and_said_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    monkeypatch.setattr(tagger_module, "DOWNLOAD_TIMEOUT_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as never_answers, caplog.at_level(logging.INFO, logger="nemo_mapo"):
        for scheme in ("http", "https"):
            monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{never_answers.getsockname()[1]}")
        tagger = build_tagger()
    assert tagger.name == CHAIN_NAME
    assert CHAIN_NAME in caplog.text
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("don't", ("do", "n't")),
        ("Can't", ("Ca", "n't")),
        ("it\u2019s", ("it", "'s")),
        ("they'll", ("they", "'ll")),
        ("o'clock", ("o'clock",)),
        ("low-pitched", ("low-pitched",)),
        ("bells", ("bells",)),
    ],
)
def test_contractions_split_as_in_the_penn_treebank(word: str, parts: tuple[str, ...]):
    assert word_parts(word) == parts


def test_sentences_end_at_marks_line_breaks_and_markup_but_not_inside_numbers():
    text = "<think>At 1.5 s a bell. It rings\nthen stops</think> bell"
    assert [[text[unit.start : unit.end] for unit in sentence] for sentence in sentences_of(text)] == [
        ["At", "1.5", "s", "a", "bell", "."],
        ["It", "rings"],
        ["then", "stops"],
        ["bell"],
    ]


@needs_perceptron
def test_the_perceptron_is_chosen_where_its_data_is_present():
    tagged = build_tagger(download=False).tag(["i", "hear", "a", "low", "tone", "."])
    assert [tag for _, tag in tagged] == ["PRON", "VERB", "DET", "ADJ", "NOUN", "."]


@needs_perceptron
@pytest.mark.parametrize("part", ["tuning", "held out"])
def test_the_chain_gates_like_the_perceptron_on_reasoning_text(part: str):
    parts = read_parts(TEXT)
    tokenizer = byte_level_tokenizer([line for lines in parts.values() for line in lines])
    agreement = measure(
        parts[part], tokenizer, ObjectiveConfig().pos_tags, build_tagger(download=False), build_chain_tagger()
    )
    assert agreement.word_tokens >= LEAST_AGREEMENT
