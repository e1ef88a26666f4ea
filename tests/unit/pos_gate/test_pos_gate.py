"""The gate lies on the right tokens, whatever the tokenizer, and says when it cannot."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.pos_gate import pos_token_gate
from nemo_mapo.pos_gate.gate import gate_batch
from nemo_mapo.pos_gate.tagger import build_chain_tagger
from tests.unit.pos_gate import tokenizers_for_gate as zoo

TAGS = ObjectiveConfig().pos_tags
CHAIN = build_chain_tagger()

FAMILIES: dict[str, Callable[[Path], PreTrainedTokenizerBase]] = {
    "byte-level": lambda _: zoo.byte_level_bpe(),
    "metaspace": lambda _: zoo.metaspace_bpe(),
    "whole words": lambda _: zoo.whole_words(),
    "slow byte-level": zoo.slow_byte_level_bpe,
    "slow sentencepiece": zoo.slow_sentencepiece,
}


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return FAMILIES[request.param](tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerBase:
    return zoo.byte_level_bpe()


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def gated_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The gated tokens decoded, without white space."""
    result = pos_token_gate(ids, tokenizer, TAGS, CHAIN)
    assert result.fallback is None
    assert len(result.gate) == len(ids)
    kept = [token_id for token_id, gate in zip(ids, result.gate, strict=True) if gate]
    return "".join(tokenizer.decode(kept, clean_up_tokenization_spaces=False).split())


def test_every_tokenizer_family_gates_the_same_words_of_a_templated_completion(tokenizer: PreTrainedTokenizerBase):
    text = "<think> i hear a low tone, then a rising sweep. so the sweep seems peaking. </think> peaking"
    assert gated_text(tokenizer, encode(tokenizer, text)) == "hearlowtonethenrisingsweepsosweepseemspeakingpeaking"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The dog\n\nbarks\tloudly", "dogbarksloudly"),
        ("<reasoning>a bell rings</reasoning><answer>bell</answer>", "bellringsbell"),
        ("<reasoning>\na bell rings\n</reasoning>\n<answer>\nbell\n</answer>", "bellringsbell"),
        ("a bell rings</reason", "bellrings"),  # markup cut off at the length limit
        ('(the) "bell" -- and ... its ring!', "bellring"),
        ("a clip-clop of low-pitched hooves", "clip-cloplow-pitchedhooves"),
        ("it lasts 1.5 seconds or 1,000 ms at 440Hz", "lasts1.5seconds1,000ms440Hz"),
        ("shhh and woof", "shhhwoof"),
        ("we don\u2019t, it's", "don\u2019tit's"),
        ("of the naïve 日本 café", "naïve日本café"),
        ("of the cafe\u0301", "cafe\u0301"),
        ("to hear 🐕 of it", "hear"),
        ("B) of the train", "Btrain"),
        ("tempo < 120 bpm and > 60", "tempo120bpm60"),
    ],
)
def test_words_of_substance_are_gated_and_nothing_else(byte_level: PreTrainedTokenizerBase, text: str, expected: str):
    assert gated_text(byte_level, encode(byte_level, text)) == expected


def test_unusual_text_is_gated_alike_by_sentencepiece(tmp_path: Path):
    tokenizer = zoo.slow_sentencepiece(tmp_path)
    ids = encode(tokenizer, "<reasoning>of the naïve 日本 café</reasoning>\n<answer>to hear 🐕</answer>")
    assert gated_text(tokenizer, ids) == "naïve日本caféhear"


def test_special_and_pad_tokens_are_never_substantive(byte_level: PreTrainedTokenizerBase):
    words = encode(byte_level, "bell")
    ids = [byte_level.eos_token_id, *words, byte_level.eos_token_id, byte_level.pad_token_id, byte_level.pad_token_id]
    gate = pos_token_gate(ids, byte_level, TAGS, CHAIN).gate
    assert gate == (False, *[True] * len(words), False, False, False)


def test_a_special_token_parts_the_words_on_its_sides(byte_level: PreTrainedTokenizerBase):
    ids = [*encode(byte_level, "of"), byte_level.eos_token_id, *encode(byte_level, "fence")]
    gate = pos_token_gate(ids, byte_level, TAGS, CHAIN).gate
    assert not any(gate[: len(encode(byte_level, "of")) + 1])
    assert all(gate[len(encode(byte_level, "of")) + 1 :])


def test_all_tokens_of_a_word_share_its_gate(byte_level: PreTrainedTokenizerBase):
    ids = encode(byte_level, "the uncharacteristically somewhere")
    pieces = byte_level.convert_ids_to_tokens(ids)
    gate = pos_token_gate(ids, byte_level, TAGS, CHAIN).gate
    assert len(ids) > 4
    assert [piece for piece, on in zip(pieces, gate, strict=True) if not on] == pieces[: len(encode(byte_level, "the"))]


def test_a_word_of_multi_byte_characters_is_gated_when_cut_between_bytes(byte_level: PreTrainedTokenizerBase):
    ids = encode(byte_level, "the 日本")[:-1]  # the last character lacks its last byte
    result = pos_token_gate(ids, byte_level, TAGS, CHAIN)
    assert result.fallback is None
    assert [byte_level.decode(ids[3:6]), sum(result.gate[3:6])] == ["日", 3]
    assert sum(result.gate) == 3  # the bytes left over are no character and belong to no word


def test_an_ordinary_word_added_to_the_vocabulary_counts_as_a_word():
    tokenizer = zoo.byte_level_bpe()
    tokenizer.add_tokens(["thwöp"])  # transformers itself decodes such a token wrongly
    result = pos_token_gate(encode(tokenizer, "of a thwöp"), tokenizer, TAGS, CHAIN)
    assert result.fallback is None
    assert [on for on in result.gate if on] == [result.gate[-1]]


def test_an_added_word_stands_apart_from_its_neighbours_in_a_vocabulary_of_words():
    tokenizer = zoo.whole_words()
    tokenizer.add_tokens(["of"])
    ids = [*encode(tokenizer, "loud"), *encode(tokenizer, "of"), *encode(tokenizer, "the")]
    assert pos_token_gate(ids, tokenizer, TAGS, CHAIN).gate == (True, False, False)


def test_a_contraction_is_substantive_as_a_whole_when_a_part_is(byte_level: PreTrainedTokenizerBase):
    ids = encode(byte_level, "it's the")
    assert gated_text(byte_level, ids) == "it's"
    only_nouns = pos_token_gate(ids, byte_level, ["NOUN"], CHAIN)
    assert only_nouns.fallback == "no_substantive_token"


def test_the_tags_decide(byte_level: PreTrainedTokenizerBase):
    ids = encode(byte_level, "the loud bell rings")
    gate = pos_token_gate(ids, byte_level, ["ADJ"], CHAIN).gate
    kept = [token_id for token_id, on in zip(ids, gate, strict=True) if on]
    assert byte_level.decode(kept).strip() == "loud"


def test_no_substantive_token_gives_ones_over_the_real_tokens_and_a_reason(byte_level: PreTrainedTokenizerBase):
    ids = encode(byte_level, "<think> of the, and </think>")
    result = pos_token_gate([*ids, byte_level.pad_token_id], byte_level, TAGS, CHAIN)
    assert result.fallback == "no_substantive_token"
    assert result.gate == (*[True] * len(ids), False)


def test_an_empty_completion_says_so(byte_level: PreTrainedTokenizerBase):
    assert pos_token_gate([], byte_level, TAGS, CHAIN).fallback == "empty"
    padding = pos_token_gate([byte_level.pad_token_id] * 2, byte_level, TAGS, CHAIN)
    assert (padding.gate, padding.fallback) == ((False, False), "empty")


def test_a_lone_stop_token_that_doubles_as_pad_still_gets_a_one(tmp_path: Path):
    tokenizer = zoo.slow_byte_level_bpe(tmp_path)
    tokenizer.pad_token = tokenizer.eos_token
    result = pos_token_gate([tokenizer.eos_token_id] * 3, tokenizer, TAGS, CHAIN)
    assert (result.gate, result.fallback) == ((True, False, False), "no_substantive_token")


def test_a_tokenizer_whose_spelling_is_unknown_falls_back_as_misaligned(byte_level: PreTrainedTokenizerBase):
    class Reversing(type(byte_level)):  # type: ignore[misc]
        """Decodes from right to left, as no supported family does."""

        def decode(self, token_ids, **kwargs):
            return super().decode(token_ids, **kwargs)[::-1]

    tokenizer = Reversing(tokenizer_object=byte_level.backend_tokenizer)
    ids = encode(byte_level, "a loud bell")
    result = pos_token_gate(ids, tokenizer, TAGS, CHAIN)
    assert (result.gate, result.fallback) == ((True,) * len(ids), "misaligned")


@pytest.mark.parametrize("tags", [[], ["NOUN", "NN"], ["noun"], ["."]])
def test_tags_that_are_not_universal_are_refused(byte_level: PreTrainedTokenizerBase, tags: list[str]):
    with pytest.raises(ValueError, match="tags="):
        pos_token_gate([0], byte_level, tags, CHAIN)


def test_a_batch_is_its_rows_and_counts_fallbacks(byte_level: PreTrainedTokenizerBase):
    rows = [encode(byte_level, text) for text in ("a loud bell rings", "of the", "bell", "and it")]
    gates, fallbacks = gate_batch(rows, byte_level, TAGS, CHAIN)
    assert gates == [pos_token_gate(ids, byte_level, TAGS, CHAIN).gate for ids in rows]
    assert fallbacks == {"no_substantive_token": 2}
    assert gate_batch([], byte_level, TAGS, CHAIN) == ([], {})


def test_a_rollout_batch_is_gated_in_a_fraction_of_a_second(byte_level: PreTrainedTokenizerBase):
    text = " ".join(zoo.LINES)
    ids = encode(byte_level, text)
    rows = [ids[start : start + 70] for start in range(0, 64 * 35, 35)]
    tagger = build_chain_tagger()
    started = time.thread_time()  # processor time: other work on the machine does not count
    gate_batch(rows, byte_level, TAGS, tagger)
    assert time.thread_time() - started < 1.0  # measured 0.05 s, with shape checks more


def test_answer_words_stay_in_the_gate_whatever_their_tag(byte_level: PreTrainedTokenizerBase):
    ids = encode(byte_level, "is it deep? No. is it low? yes.")

    def kept(words: tuple[str, ...]) -> str:
        gate = pos_token_gate(ids, byte_level, ["ADJ"], CHAIN, words).gate
        return "".join(byte_level.decode([token for token, on in zip(ids, gate, strict=True) if on]).split())

    assert kept(()) == "deeplow"
    assert kept(("yes", "no")) == "deepNolowyes"
