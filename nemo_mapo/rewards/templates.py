"""The two chain-of-thought templates of the paper, taken apart."""

import re
from dataclasses import dataclass
from typing import Literal

Template = Literal["think", "reasoning"]

_THINK = ("<think>", "</think>")
_REASONING = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
_ALL_TAGS = (*_THINK, *_REASONING)

_STRICT = {
    "think": re.compile(r"\s*<think>(?P<reasoning>.*)</think>(?P<answer>.*)", re.DOTALL),
    "reasoning": re.compile(
        r"\s*<reasoning>(?P<reasoning>.*)</reasoning>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL
    ),
}
_OPENING = re.compile(r"\s*<(?:think|reasoning)>")
_CLOSING = {"think": "</think>", "reasoning": "</reasoning>"}


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The two parts of a completion that follows its template."""

    reasoning: str
    answer: str


def split_completion(text: str, template: Template) -> Completion | None:
    """Take a completion apart, or return None where it departs from `template` in anything.

    `<think>reasoning</think>answer` or `<reasoning>reasoning</reasoning><answer>answer</answer>`: each tag once, in
    order, no tag of the other template, only white space before, between and after, and a letter or digit in both
    parts.
    """
    own_tags = _THINK if template == "think" else _REASONING
    if any(text.count(tag) != (tag in own_tags) for tag in _ALL_TAGS):
        return None
    match = _STRICT[template].fullmatch(text)
    if match is None or not (_says_something(match["reasoning"]) and _says_something(match["answer"])):
        return None
    return Completion(reasoning=match["reasoning"].strip(), answer=match["answer"].strip())


def closed_reasoning(text: str, template: Template) -> str | None:
    """Return the reasoning, or None where it is not closed exactly once; the opening tag may be in the prompt."""
    closing = _CLOSING[template]
    if text.count(closing) != 1:
        return None
    return _OPENING.sub("", text.split(closing)[0], count=1).strip()


def extract_answer(text: str, template: Template, *, finished: bool = True) -> str | None:
    """Return the one answer that a completion gives, or None where it gives none or several.

    `think`: what follows the only `</think>`; an unfinished completion has no answer there, for the rest of it may be
    missing. `reasoning`: what stands in the only `<answer>...</answer>`, outside the reasoning.
    """
    if template == "think":
        _, closing, answer = text.partition("</think>")
        if not (finished and closing) or any(tag in answer for tag in _THINK):
            return None
        return answer.strip() or None
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    before, _, rest = text.partition("<answer>")
    answer, closing, after = rest.partition("</answer>")
    if not closing or any(tag in answer or tag in after for tag in _REASONING):
        return None
    if "<reasoning>" in before and "</reasoning>" not in before:
        return None
    return answer.strip() or None


def reasoning_words(text: str) -> int:
    """Count the words of the reasoning in either template; up to the end of the text where it is not closed."""
    opened = _OPENING.sub("", text, count=1)
    reasoning = re.split(r"</(?:think|reasoning)>", opened, maxsplit=1)[0]
    return len(re.findall(r"\w[\w'-]*", reasoning))


def _says_something(part: str) -> bool:
    return any(character.isalnum() for character in part)
