"""MMAU-Pro's instruction-following part: its rules, each a yes/no question about the text of a response."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Arguments = Mapping[str, Any]

TWO_RESPONSES_SEPARATOR = "******"
PARAGRAPH_SEPARATOR = "***"
LIST_SEPARATOR = ", "
"""Between the words of the arguments `keywords` and `forbidden_words`."""
_SENTENCE_RULES = "Number Sentences"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An instruction that can be checked."""

    arguments: Mapping[str, type]
    """Names and types of the arguments that it needs."""
    holds: Callable[[str, Arguments], bool]


def check_arguments(rule: str, arguments: Arguments, where: str) -> dict[str, Any]:
    """The arguments that a rule needs; ValueError if the rule is unknown, or one is missing or of the wrong type."""
    if rule not in RULES:
        raise ValueError(f"{where}: unknown instruction {rule!r}; known: {', '.join(RULES)}")
    checked = {}
    for name, kind in RULES[rule].arguments.items():
        value = arguments.get(name)
        # Parquet keeps an integer column with gaps as floating point.
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, kind) or isinstance(value, bool) or value == "":
            wanted = "an integer" if kind is int else "a non-empty text"
            raise ValueError(f"{where}: instruction {rule!r} has {name}={value!r}: it must be {wanted}")
        checked[name] = value
    return checked


def follows_instruction(response: str, rule: str, arguments: Arguments, question: str) -> bool:
    """Whether a response follows `rule`; `question` is the prompt that "Repeat Prompt" asks for."""
    return RULES[rule].holds(response, {**arguments, "question": question})


def needs_sentences(rule: str | None) -> bool:
    """Whether a rule counts sentences, which needs NLTK's data."""
    return rule is not None and rule.startswith(_SENTENCE_RULES)


def count_sentences(text: str) -> int:
    """Count sentences as NLTK's English Punkt model splits them; ValueError without its data."""
    from nltk.tokenize import sent_tokenize

    try:
        return len(sent_tokenize(text))
    except LookupError as error:
        raise ValueError(
            "counting sentences, as some instructions of MMAU-Pro require, needs NLTK's punkt_tab data: "
            "run `python -m nltk.downloader punkt_tab`, or point NLTK_DATA to a directory that has it"
        ) from error


def count_words(text: str) -> int:
    """Count runs without white space."""
    return len(text.split())


def count_capital_words(text: str) -> int:
    """Count words whose letters are all capital."""
    return sum(word.isupper() for word in text.split())


def count_paragraphs(text: str) -> int:
    """Count the non-empty parts separated by ***."""
    return _parts(text, PARAGRAPH_SEPARATOR)


def count_bullets(text: str) -> int:
    """Count lines that begin with an asterisk and a space."""
    return len(re.findall(r"(?:^|\n)\s*\*\s+", text))


def count_occurrences(text: str, word: str) -> int:
    """Count a word, in any case, between word boundaries."""
    return len(re.findall(rf"\b{re.escape(word.lower())}\b", text.lower()))


def count_highlights(text: str) -> int:
    """Count spans *between asterisks*."""
    return len(re.findall(r"\*[^*]+\*", text))


def count_placeholders(text: str) -> int:
    """Count [placeholders]."""
    return len(re.findall(r"\[[^\]]+\]", text))


def _parts(text: str, separator: str) -> int:
    return sum(bool(part.strip()) for part in text.strip().split(separator))


def _letters(text: str) -> str:
    return re.sub(r"[^a-z]", "", text.lower())


def _letters_and_spaces(text: str) -> str:
    return re.sub(r"[^a-z ]", "", text.lower())


def _two_different(text: str) -> bool:
    parts = [part.strip().lower() for part in text.split(TWO_RESPONSES_SEPARATOR)]
    return len(parts) == 2 and parts[0] != parts[1]


def _quoted(text: str) -> bool:
    stripped = text.strip()
    return stripped.startswith('"') and stripped.endswith('"')


def _bounds(name: str, count: Callable[[str], int]) -> dict[str, Rule]:
    """The three forms in which a count can be bounded."""
    number, pair = {"N": int}, {"N1": int, "N2": int}
    return {
        f"{name} (at least)": Rule(arguments=number, holds=lambda text, given: count(text) >= given["N"]),
        f"{name} (at most)": Rule(arguments=number, holds=lambda text, given: count(text) <= given["N"]),
        f"{name} (range)": Rule(arguments=pair, holds=lambda text, given: given["N1"] <= count(text) <= given["N2"]),
    }


def _exactly(count: Callable[[str], int]) -> Rule:
    return Rule(arguments={"N": int}, holds=lambda text, given: count(text) == given["N"])


def _at_least(count: Callable[[str], int]) -> Rule:
    return Rule(arguments={"N": int}, holds=lambda text, given: count(text) >= given["N"])


def _plain(holds: Callable[[str], bool]) -> Rule:
    return Rule(arguments={}, holds=lambda text, given: holds(text))


RULES: dict[str, Rule] = {
    "Include Keywords": Rule(
        arguments={"keywords": str},
        holds=lambda text, given: all(word in text.lower() for word in given["keywords"].lower().split(LIST_SEPARATOR)),
    ),
    "Keyword Frequency": Rule(
        arguments={"keyword": str, "N": int},
        holds=lambda text, given: count_occurrences(text, given["keyword"]) == given["N"],
    ),
    "Forbidden Words": Rule(
        arguments={"forbidden_words": str},
        holds=lambda text, given: (
            not any(word in text.lower() for word in given["forbidden_words"].lower().split(LIST_SEPARATOR))
        ),
    ),
    "Number Paragraphs": _exactly(count_paragraphs),
    **_bounds("Number Words", count_words),
    **_bounds(_SENTENCE_RULES, count_sentences),
    "Postscript": Rule(
        arguments={"postscript_marker": str},
        holds=lambda text, given: _letters(given["postscript_marker"]) in _letters(text),
    ),
    "Number Placeholder": _at_least(count_placeholders),
    "Number Bullets": _exactly(count_bullets),
    "Title": _plain(lambda text: re.search(r"<<[^>]+>>", text) is not None),
    "Minimum Number Highlighted Section": _at_least(count_highlights),
    "Multiple Sections": Rule(
        arguments={"N": int, "section_splitter": str},
        holds=lambda text, given: _parts(text, given["section_splitter"]) == given["N"],
    ),
    "Repeat Prompt": Rule(
        arguments={},
        holds=lambda text, given: text.strip().lower().startswith(given["question"].strip().lower()),
    ),
    "Two Responses": _plain(_two_different),
    "All Uppercase": _plain(str.isupper),
    "All Lowercase": _plain(str.islower),
    **_bounds("All-capital Words", count_capital_words),
    "Start Checker": Rule(
        arguments={"start_phrase": str},
        holds=lambda text, given: _letters_and_spaces(text).startswith(_letters_and_spaces(given["start_phrase"])),
    ),
    "End Checker": Rule(
        arguments={"end_phrase": str},
        holds=lambda text, given: _letters_and_spaces(text).endswith(_letters_and_spaces(given["end_phrase"])),
    ),
    "Quotation": _plain(_quoted),
    "No Commas": _plain(lambda text: "," not in text),
}
