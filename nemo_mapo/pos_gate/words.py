"""Text to sentences, words and the parts of words that a part-of-speech tagger expects."""

import re
from dataclasses import dataclass

MARKUP = re.compile(r"</?\|?[A-Za-z_][\w.-]*\|?(?:>|$)")
"""`<think>`, `</answer>`, `<|im_end|>`; at the end of a text also a truncated tag."""

_UNIT = re.compile(
    r"""
    (?P<word>
        \d+(?:[.,:]\d+)+\w*                                     # 44.1, 10,000, 12:30, 1.5kHz
      | [^\W_][\u0300-\u036f]*(?:[^\W_][\u0300-\u036f]*)*       # letters and digits, with combining accents
        (?:['\u2019\u2010\u2011-](?:[^\W_][\u0300-\u036f]*)+)*  # don't, clip-clop
    )
  | (?P<mark>[^\s])
    """,
    re.VERBOSE,
)
_SENTENCE_MARKS = frozenset(".!?;\u2026\u3002\uff01\uff1f")
_LINE_BREAK = re.compile(r"[\n\r]")

_CLITIC = re.compile(r"(?P<host>\w[\w-]*?)(?P<clitic>n't|'(?:s|m|d|re|ve|ll))$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A word or a punctuation mark of a text."""

    start: int
    """First character in the text."""
    end: int
    """One past the last character."""
    parts: tuple[str, ...]
    """What the tagger sees: one string, or host and clitic of a contraction."""
    is_word: bool


def sentences_of(text: str) -> list[list[Unit]]:
    """Split a text into sentences of words and marks; markup belongs to none and ends a sentence.

    A sentence ends after one of . ! ? ; and at a line break. Hyphenated compounds, contractions and numbers with
    separators are one word each.
    """
    sentences: list[list[Unit]] = [[]]
    position = 0
    for markup in [*MARKUP.finditer(text), None]:
        stop = len(text) if markup is None else markup.start()
        _append_units(sentences, text, position, stop)
        if markup is not None:
            sentences.append([])
            position = markup.end()
    return [sentence for sentence in sentences if sentence]


def _append_units(sentences: list[list[Unit]], text: str, start: int, stop: int) -> None:
    previous_end = start
    for match in _UNIT.finditer(text, start, stop):
        if _LINE_BREAK.search(text, previous_end, match.start()):
            sentences.append([])
        previous_end = match.end()
        is_word = match["word"] is not None
        parts = word_parts(match[0]) if is_word else (match[0],)
        sentences[-1].append(Unit(start=match.start(), end=match.end(), parts=parts, is_word=is_word))
        if match[0] in _SENTENCE_MARKS:
            sentences.append([])


def word_parts(word: str) -> tuple[str, ...]:
    """Split a contraction as the Penn Treebank does: don't is do + n't, it's is it + 's; other words stay whole."""
    plain = word.replace("\u2019", "'")
    clitic = _CLITIC.match(plain)
    return (clitic["host"], clitic["clitic"]) if clitic else (plain,)
