"""Choices: drawn for corpora that have none, and parsed from prompts that list them."""

import ast
import random
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from nemo_mapo.data.importers.base import InvalidRecord, Row
from nemo_mapo.rewards.answers import resolve_choice

DISTRACTORS = 3
"""Wrong choices of a question that we construct: four with the right one, as in the benchmarks."""

Option = TypeVar("Option")

_IN_TEXT = re.compile(r"\(([A-Z])\)\s*")
_ON_LINES = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]*", re.MULTILINE)
_LIST = re.compile(r"\[.*\]", re.DOTALL)
_LEAD_IN = re.compile(
    r"(?:^|(?<=[.?!:\n]))\s*(?:please\s+)?(?:choose|select|pick|options?|choices?)\b[^.?!]*[:.]?\s*$", re.IGNORECASE
)
_PLACEHOLDER = re.compile(r"<(?:audio|sound|speech)(?:-\d+)?>")
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def randomness(seed: int, name: str) -> random.Random:
    """A generator that depends only on the seed and the question, not on the questions before it."""
    return random.Random(f"{seed}/{name}")


def draw(
    pool: Sequence[Option], count: int, generator: random.Random, allowed: Callable[[Option], bool]
) -> list[Option]:
    """Up to `count` different allowed indices of `pool` in random order; fewer if there are no more."""
    found: list[Option] = []
    tried: set[int] = set()
    while len(found) < count and len(tried) < len(pool):
        place = generator.randrange(len(pool))
        if place not in tried:
            tried.add(place)
            if allowed(pool[place]) and pool[place] not in found:
                found.append(pool[place])
    return found


def shuffled(answer: str, distractors: Sequence[str], generator: random.Random) -> tuple[str, ...]:
    """The choices of a question that we construct, in random order."""
    choices = [answer, *distractors]
    generator.shuffle(choices)
    return tuple(choices)


def split_options(prompt: str) -> tuple[str, tuple[str, ...]]:
    """Question and choices of a prompt that lists its choices; no choices if none are found.

    Recognises lines `A. one` (or `(A) one`, `A) one`, `A: one`), `(A) one (B) two` within a line if no letter occurs
    twice, and a Python list `['one', 'two']`. Audio placeholders and a lead-in such as "Choose the correct option from
    the following options:" are removed from the question; separate lines after the choices count as an instruction and
    are dropped.
    """
    text = _PLACEHOLDER.sub(" ", prompt).strip()
    for pattern, marks in ((_ON_LINES, " \t"), (_IN_TEXT, " \t,;.")):
        labels = _labels(pattern, text)
        if len(labels) >= 2:
            ends = [label.start() for label in labels[1:]] + [len(text)]
            parts = [text[label.end() : end].strip() for label, end in zip(labels, ends, strict=True)]
            choices = tuple(part.splitlines()[0].rstrip(marks) if part else "" for part in parts)
            return _without_lead_in(text[: labels[0].start()]), choices
    listed = _LIST.search(text)
    if listed is not None:
        choices = _literal_texts(listed[0])
        if choices:
            return _without_lead_in(text[: listed.start()]), choices
    return text, ()


def answer_choice(row: Row, field: str, choices: Sequence[str], *, counts_from_zero: bool = False) -> str:
    """The choice that a field names by index (an integer, from 0), letter or text.

    A number that is both an index and the text of another choice names neither, unless the corpus is known to give
    indices (`counts_from_zero`).

    Raises:
        InvalidRecord: no answer, or none of the choices, or several.
    """
    value: Any = row.fields.get(field)
    if value is None or value == "":
        raise row.wrong(field, "a question needs an answer", "question without answer")
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        indexed = choices[value]
        is_text_of_another = str(value) in choices and str(value) != indexed
        if counts_from_zero or not is_text_of_another:
            return indexed
    if isinstance(value, str):
        tagged = _ANSWER_TAG.search(value)
        place = resolve_choice(tagged[1] if tagged else value, choices)
        if place is not None:
            return choices[place]
    raise InvalidRecord(
        "answer not among the choices",
        f"{row.where}: field {field!r} is {value!r}, which names none of the choices {list(choices)}, or several: "
        "give the text of one, its letter, or its index from 0",
    )


def _labels(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    """The labels A, B, C... of the choices, in order; none if a letter occurs twice or is missing."""
    labels = list(pattern.finditer(text))
    return labels if "".join(label[1] for label in labels) == string.ascii_uppercase[: len(labels)] else []


def _literal_texts(text: str) -> tuple[str, ...]:
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return ()
    is_texts = isinstance(values, list) and all(isinstance(value, str) for value in values)
    return tuple(values) if is_texts else ()


def _without_lead_in(text: str) -> str:
    plain = text.strip()
    # "Select the instrument that plays." may be the whole question.
    return _LEAD_IN.sub("", plain).strip() or plain
