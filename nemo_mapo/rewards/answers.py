"""Which of the choices an answer means: strictly, and nothing where it may mean two."""

import re
import string
import unicodedata
from collections.abc import Sequence

from nemo_mapo.rewards.templates import extract_answer, reasoning_words

__all__ = ["extract_answer", "normalise_answer", "reasoning_words", "resolve_choice"]

_STRAIGHT_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})
_WRAPPERS = "\"'`*"
_FINAL_MARKS = ".,;:!?"

_LABEL = r"(?:\(\s*(?P<round>[A-Za-z])\s*\)|\[\s*(?P<square>[A-Za-z])\s*\]|(?P<bare>[A-Za-z]))"
_ONLY_LABEL = re.compile(rf"{_LABEL}\s*[.):]?")
_LABEL_AND_TEXT = re.compile(
    r"(?:\(\s*(?P<round>[A-Za-z])\s*\)\s*[.:]?|\[\s*(?P<square>[A-Za-z])\s*\]\s*[.:]?"
    r"|(?P<bare>[A-Za-z])\s*(?:[.):]|\s[-\u2013\u2014](?=\s)))\s*(?P<text>\S.*)",
    re.DOTALL,
)
_LEAD_IN = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:(?:the|my)\s+)?(?:(?:final|correct|right|best)\s+)*"
    r"(?:(?:answer|choice|option)\s*(?:is\b\s*:?|:)|(?:answer|choice|option)\b(?=\s*[(\[]?\s*[A-Za-z]\b\s*(?:\W|$)))\s*",
    re.IGNORECASE,
)


def normalise_answer(text: str) -> str:
    """Forget what does not change an answer: case, runs of white space, wrapping quotes and asterisks, final marks."""
    plain = " ".join(unicodedata.normalize("NFC", text).translate(_STRAIGHT_QUOTES).lower().split())
    while True:
        shorter = plain.rstrip(_FINAL_MARKS).rstrip()
        if len(shorter) > 1 and shorter[0] == shorter[-1] and shorter[0] in _WRAPPERS:
            shorter = shorter[1:-1].strip()
        if shorter in (plain, ""):
            return plain
        plain = shorter


def resolve_choice(answer: str | None, choices: Sequence[str]) -> int | None:
    """Return the index of the choice that an answer names, or None where it names none or may name several.

    An answer names a choice by its whole text (up to `normalise_answer`), by its letter (B, b, (B), B.), or by both
    (B) text), with or without "answer:" or "the answer is" before it. The exact text wins over the letter, a letter
    whose text is another choice's names nothing, and no choice is ever matched by a part of its text.
    """
    if answer is None or not answer.strip():
        return None
    spellings = _spellings(choices)
    lead_in = _LEAD_IN.match(_unwrapped(answer))
    readings = [answer] if lead_in is None else [answer, _unwrapped(answer)[lead_in.end() :]]
    for reading in readings:
        matches = _matches(reading, spellings)
        if matches:
            return matches[0] if len(matches) == 1 else None
        index = _by_letter(_unwrapped(reading), spellings)
        if index is not None:
            return index
    return None


def _by_letter(answer: str, spellings: list[tuple[str, ...]]) -> int | None:
    """Resolve a letter, alone or followed by its own choice's text."""
    only_label = _ONLY_LABEL.fullmatch(answer)
    match = only_label or _LABEL_AND_TEXT.fullmatch(answer)
    if match is None:
        return None
    letter = _letter(match)
    index = string.ascii_lowercase.index(letter)
    if index >= len(spellings):
        return None
    if only_label:
        # "(A)" where "A" is also the text of another choice may mean either.
        return index if _matches(letter, spellings) in ([], [index]) else None
    return index if _matches(match["text"], spellings) == [index] else None


def _letter(match: re.Match[str]) -> str:
    return str(match["round"] or match["square"] or match["bare"]).lower()


def _matches(text: str, spellings: list[tuple[str, ...]]) -> list[int]:
    """Find the choices that `text` spells out: exactly, else up to normalisation."""
    exact = " ".join(text.split())
    found = [index for index, forms in enumerate(spellings) if any(exact == " ".join(form.split()) for form in forms)]
    if found:
        return found
    plain = normalise_answer(text)
    return [index for index, forms in enumerate(spellings) if any(plain == normalise_answer(form) for form in forms)]


def _spellings(choices: Sequence[str]) -> list[tuple[str, ...]]:
    """List each choice's text and, where all choices carry their own letters (A) dog, B) cat), the text after it."""
    labelled = [_LABEL_AND_TEXT.fullmatch(choice.strip()) for choice in choices]
    texts = [
        match["text"]
        for letter, match in zip(string.ascii_lowercase, labelled, strict=False)
        if match is not None and _letter(match) == letter
    ]
    if len(texts) == len(choices):
        return list(zip(choices, texts, strict=True))
    return [(choice,) for choice in choices]


def _unwrapped(answer: str) -> str:
    """Take off bold marks and wrapping quotes."""
    plain = answer.translate(_STRAIGHT_QUOTES).replace("**", "").strip()
    while len(plain) > 2 and plain[0] == plain[-1] and plain[0] in _WRAPPERS:
        plain = plain[1:-1].strip()
    return plain
