"""Finds the choice that an answer names: one strict grammar, and no choice if two are possible."""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_mapo.rewards.answer_text import (
    CLAUSE_END,
    CONFIRMATION,
    DENIAL,
    EXCLUSION,
    EXPLANATION,
    FINAL_MARKS,
    OPENING,
    RETRACTION,
    STATEMENT,
    fold,
    plain_answer,
    unwrap,
)
from nemo_mapo.rewards.templates import extract_answer, reasoning_words

__all__ = ["extract_answer", "normalise_answer", "reasoning_words", "resolve_choice"]

_LABEL = re.compile(
    r"(?:(?:option|choice|answer|选项|選項)\s*(?=[(\[A-Za-z]))?"
    r"(?:\(\s*(?P<round>[A-Za-z])\s*\)|\[\s*(?P<square>[A-Za-z])\s*\]|(?P<bare>[A-Za-z])(?![A-Za-z0-9\u00c0-\u024f])(?P<close>\s?[.):\]]|))",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(r"[\s,.:;)\]-]*")
_OTHER_LABEL = re.compile(
    r"[(\[]\s*([A-Za-z])\s*[)\]]|(?<![^\W_])([B-HJ-Z])(?![^\W_])|(?<![^\W_])(A)(?=\s*(?:[.):,]|$))"
)
_CHOICE_LABEL = re.compile(
    r"(?:\(\s*(?P<round>[A-Za-z])\s*\)\s*[.:]?|\[\s*(?P<square>[A-Za-z])\s*\]\s*[.:]?"
    r"|(?P<bare>[A-Za-z])\s*(?:[.):]|\s[-\u2013\u2014](?=\s)))\s*(?P<text>\S.*)",
    re.DOTALL,
)
_QUOTED = "\"'"


@dataclass(frozen=True, kw_only=True)
class _Read:
    """The choice named at the beginning of a statement."""

    index: int
    rest: str
    """What follows."""
    by_text: bool
    """Whether the text of the choice was given, alone or with its letter."""


class _Contradiction(ValueError):
    """A letter with the text of another choice."""


def normalise_answer(text: str) -> str:
    """Remove what does not change an answer: case, character forms, white space, wrappers, emphasis, final marks."""
    plain = _key(text)
    while True:
        shorter = plain.rstrip(FINAL_MARKS).rstrip()
        if len(shorter) > 1 and shorter[0] == shorter[-1] and shorter[0] in "\"'`*":
            shorter = shorter[1:-1].strip()
        if shorter in (plain, ""):
            return plain
        plain = shorter


def resolve_choice(answer: str | None, choices: Sequence[str]) -> int | None:
    """Return the index of the choice that an answer names, or None if it names none or may name several.

    An answer names a choice by its whole text (up to `normalise_answer`), by its letter (B, b, (B), B.), or by both, in
    either order, if they agree. It may be marked up (`\\boxed{B}`, **B**, 「B」), be stated ("the answer is B",
    "答案：B"; the last statement counts), and be followed by a reason or a sentence that names no other choice. The
    exact text wins over the letter; no choice is ever matched by a part of its text; a denied answer, two answers and
    "A or B" name nothing. `resolve_choice("(B) cat", ("dog", "cat"))` is 1, `resolve_choice("B, dog", ...)` None.
    """
    if answer is None or not answer.strip():
        return None
    spellings = _spellings(choices)
    plain = plain_answer(answer)
    for whole in (answer, plain):
        matches = _matches(whole, spellings)
        if matches:
            return matches[0] if len(matches) == 1 else None
    statements = list(STATEMENT.finditer(plain))
    try:
        if not statements:
            return _complete(plain[_end(OPENING, plain) :], spellings, stated=False)
        last = statements[-1]
        if DENIAL.search(CLAUSE_END.split(plain[: last.start()])[-1]):
            return None
        return _complete(plain[last.end() :], spellings, stated=True)
    except _Contradiction:
        return None


def _complete(statement: str, spellings: list[tuple[str, ...]], *, stated: bool) -> int | None:
    """The choice that a statement begins with, if nothing after it changes the answer."""
    statement = statement.strip()
    statement = unwrap(statement[_end(EXCLUSION, statement) :])
    if len(matches := _matches(statement, spellings)) == 1:
        return matches[0]
    read = _read(statement, spellings)
    if read is None:
        return None
    rest = read.rest[_end(CONFIRMATION, read.rest) :]
    if not rest.strip(FINAL_MARKS + _QUOTED + ")] \n") or EXPLANATION.match(rest):
        return read.index
    line_ends = re.match(r"[\s.)\]]*\n", rest) is not None
    sentence_ends = re.match(r"[\"')\]]*[.!](?:\s|(?=[^\x00-\x7f]))", rest) is not None and (stated or read.by_text)
    if not (line_ends or sentence_ends):
        return None
    return None if _names_another(rest, read.index, spellings) else read.index


def _read(statement: str, spellings: list[tuple[str, ...]]) -> _Read | None:
    """The beginning of a statement. A one-character text may also be the letter before another text: "A) C"."""
    text = _by_text(statement, spellings)
    if text is not None and len(statement) - len(text.rest) > 1:
        return text
    letter = _by_letter(statement, spellings)
    return letter if letter is not None and (text is None or letter.by_text) else text


def _by_letter(statement: str, spellings: list[tuple[str, ...]]) -> _Read | None:
    """A letter, alone or before the text of its choice."""
    match = _LABEL.match(statement)
    if match is None:
        return None
    letter = _letter(match)
    index = string.ascii_lowercase.index(letter)
    if index >= len(spellings):
        return None
    rest = statement[match.end() :]
    text = _prefix(rest[_end(_SEPARATOR, rest) :], spellings)
    if text is not None:
        if text.index != index:
            raise _Contradiction
        return text
    # "(A)" may mean either if "A" is also the text of another choice.
    if _matches(letter, spellings) not in ([], [index]):
        return None
    closing = match["close"] if match["close"] is not None and match["close"].strip() == "." else ""
    return _Read(index=index, rest=closing + rest, by_text=False)


def _by_text(statement: str, spellings: list[tuple[str, ...]]) -> _Read | None:
    """The text of a choice, alone or before its letter."""
    text = _prefix(statement, spellings)
    if text is None:
        return None
    match = re.match(
        r"\s*[\"']?\s*(?:,\s*|-\s+|\.\s*)?(?:option\s+)?[(\[]?\s*([A-Za-z])\s*[)\]]?\s*(?=[.!]?\s*$)", text.rest
    )
    if match is None:
        return text
    if string.ascii_lowercase.index(match[1].lower()) != text.index:
        raise _Contradiction
    return _Read(index=text.index, rest=text.rest[match.end() :], by_text=True)


def _prefix(statement: str, spellings: list[tuple[str, ...]]) -> _Read | None:
    """The longest text of a choice that a statement begins with, as whole words; None if two are equal."""
    bare = statement.lstrip(_QUOTED)
    found: list[tuple[int, int]] = []
    for index, forms in enumerate(spellings):
        for form in forms:
            words = [re.escape(word) for word in normalise_answer(form).split()]
            match = re.match(r"\s+".join(words), bare, re.IGNORECASE) if words else None
            if match is not None and _is_boundary(bare, match.end()):
                found.append((match.end(), index))
    longest = max((end for end, _ in found), default=0)
    named = {index for end, index in found if end == longest}
    if len(named) != 1:
        return None
    return _Read(index=named.pop(), rest=bare[longest:].lstrip(_QUOTED), by_text=True)


def _is_boundary(text: str, end: int) -> bool:
    """Whether a word ends here: nothing, white space or a mark that cannot be part of the word follows."""
    rest = text[end:]
    return (
        re.match(r"$|\s|[\"')\]]|[(\[][A-Za-z][)\]]|[.,;:!?]+(?:$|\s|[^\x00-\x7f])|(?:です|だ|である|でした)", rest)
        is not None
    )


def _names_another(rest: str, index: int, spellings: list[tuple[str, ...]]) -> bool:
    """Whether the text after an answer retracts it, or names another choice by letter or by its whole text."""
    if RETRACTION.search(rest):
        return True
    letters = (next(filter(None, match.groups())).lower() for match in _OTHER_LABEL.finditer(rest))
    places = [string.ascii_lowercase.index(letter) for letter in letters]
    if any(place != index and place < len(spellings) for place in places):
        return True
    plain = f" {_key(rest)} "
    own = {normalise_answer(form) for form in spellings[index]}
    others = {normalise_answer(form) for place, forms in enumerate(spellings) if place != index for form in forms}
    for form in own:
        plain = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", " ", plain)
    return any(re.search(rf"(?<!\w){re.escape(form)}(?!\w)", plain) for form in others - {""})


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
    """List each choice's text and, if all choices carry their own letters (A) dog, B) cat), the text after it."""
    labelled = [_CHOICE_LABEL.fullmatch(choice.strip()) for choice in choices]
    texts = [
        match["text"]
        for letter, match in zip(string.ascii_lowercase, labelled, strict=False)
        if match is not None and _letter(match) == letter
    ]
    if len(texts) == len(choices):
        return list(zip(choices, texts, strict=True))
    return [(choice,) for choice in choices]


def _key(text: str) -> str:
    return " ".join(fold(text).lower().split())


def _end(pattern: re.Pattern[str], text: str) -> int:
    match = pattern.match(text)
    return 0 if match is None else match.end()
