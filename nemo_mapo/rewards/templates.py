"""Chain-of-thought templates: their prompt instructions, and parsing of completions."""

import re
from dataclasses import dataclass
from typing import Literal

from nemo_mapo.config.data import PromptConfig
from nemo_mapo.types import Wording

Template = Literal["think", "think_answer", "reasoning", "mpar2"]

_FINAL_ANSWER = "the final answer and nothing else; if choices are listed, repeat one of them word for word"
INSTRUCTIONS: dict[str, str | None] = {
    "think": "First describe between <think> and </think> what you hear and what follows from it. Then give "
    f"{_FINAL_ANSWER}.",
    "reasoning": "First describe between <reasoning> and </reasoning> what you hear and what follows from it. Then "
    f"give, between <answer> and </answer>, {_FINAL_ANSWER}.",
    "think_answer": "First describe between <think> and </think> what you hear and what follows from it. Then give, "
    f"between <answer> and </answer>, {_FINAL_ANSWER}.",
    "mpar2": "Begin with <thinking>. Between <perception> and </perception> say what you hear. Between <reasoning> "
    "and </reasoning>, take the question apart into steps, each written as Sub-question: ... Answer: ... Check them "
    f"between <review> and </review>, and end with </thinking>. Then give, between <answer> and </answer>, "
    f"{_FINAL_ANSWER}.",
    "none": None,
}
"""What `data.prompt.instruction=template` says, by template."""

_THINK = ("<think>", "</think>")
_REASONING = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
_MPAR2 = (
    *("<thinking>", "<perception>", "</perception>", "<reasoning>", "</reasoning>"),
    *("<review>", "</review>", "</thinking>", "<answer>", "</answer>"),
)
_ANSWER = ("<answer>", "</answer>")
_THINK_ANSWER = (*_THINK, *_ANSWER)
_OWN_TAGS = {"think": _THINK, "think_answer": _THINK_ANSWER, "reasoning": _REASONING, "mpar2": _MPAR2}
ALL_TAGS = tuple(dict.fromkeys((*_THINK, *_REASONING, *_MPAR2)))
"""Of all templates."""

_STRICT = {
    "think": re.compile(r"\s*<think>(?P<reasoning>.*)</think>(?P<answer>.*)", re.DOTALL),
    "reasoning": re.compile(
        r"\s*<reasoning>(?P<reasoning>.*)</reasoning>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL
    ),
    "think_answer": re.compile(r"\s*<think>(?P<reasoning>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL),
    "mpar2": re.compile(
        r"\s*<thinking>(?P<reasoning>\s*<perception>(?P<perception>.*)</perception>\s*<reasoning>(?P<steps>.*)</reasoning>"
        r"\s*<review>(?P<review>.*)</review>\s*)</thinking>\s*<answer>(?P<answer>.*)</answer>\s*",
        re.DOTALL,
    ),
}
_OPENING = re.compile(r"\s*<(?:think|reasoning|thinking)>")
_REASONING_TAGS = {
    "think": _THINK,
    "think_answer": _THINK,
    "reasoning": ("<reasoning>", "</reasoning>"),
    "mpar2": ("<thinking>", "</thinking>"),
}


def prompt_wording(config: PromptConfig, template: str) -> Wording:
    """The words of the prompts, with those of `template` ("none" has none) if the config asks for them."""
    asked = config.instruction
    return Wording(system=config.system, instruction=INSTRUCTIONS[template] if asked == "template" else asked)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The two parts of a completion that follows its template."""

    reasoning: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Mpar2Parts:
    """A completion that follows MPAR2's template."""

    perception: str
    steps: tuple[tuple[str, str], ...]
    """Sub-questions with their answers."""
    review: str
    answer: str


def split_completion(text: str, template: Template) -> Completion | None:
    """Split a completion into its parts, or return None if it deviates from `template` in any way.

    `<think>reasoning</think>answer`, `<think>reasoning</think><answer>answer</answer>`,
    `<reasoning>reasoning</reasoning><answer>answer</answer>` or that of `mpar2.py`:
    each tag once, in order, no tag of another template, only white space before, between and after, and a letter or
    digit in every part.
    """
    own_tags = _OWN_TAGS[template]
    if any(text.count(tag) != (tag in own_tags) for tag in ALL_TAGS):
        return None
    match = _STRICT[template].fullmatch(text)
    if match is None or not all(map(_says_something, match.groups())):
        return None
    return Completion(reasoning=match["reasoning"].strip(), answer=match["answer"].strip())


def join_completion(reasoning: str, answer: str, template: Template) -> str:
    """A completion in the tags of a template, `split_completion`'s inverse; ValueError for `mpar2`, which has more."""
    if template == "think":
        return f"<think> {reasoning}</think> {answer}"
    if template == "reasoning":
        return f"<reasoning>{reasoning}</reasoning><answer>{answer}</answer>"
    raise ValueError(f"template {template} is more than reasoning and answer: give whole completions")


def opening_tag(template: Template) -> str:
    """The tag that a completion in `template` begins with."""
    return _OWN_TAGS[template][0]


def has_tags(text: str) -> bool:
    """Whether a text contains a tag of any template."""
    return any(tag in text for tag in ALL_TAGS)


def mpar2_parts(text: str) -> Mpar2Parts | None:
    """Split an MPAR2 completion into its parts, or return None if it deviates from the template in any way.

    `<thinking><perception>...</perception><reasoning>Sub-question: ... Answer: ... (at least once)</reasoning>
    <review>...</review></thinking><answer>...</answer>`.
    """
    if split_completion(text, "mpar2") is None:
        return None
    match = _STRICT["mpar2"].fullmatch(text)
    assert match is not None, "split_completion matched it"
    first, *asked = match["steps"].split("Sub-question:")
    steps = tuple(tuple(part.strip() for part in step.split("Answer:")) for step in asked)
    if first.strip() or not steps or any(len(step) != 2 or not all(map(_says_something, step)) for step in steps):
        return None
    return Mpar2Parts(
        perception=match["perception"].strip(),
        steps=tuple((step[0], step[1]) for step in steps),
        review=match["review"].strip(),
        answer=match["answer"].strip(),
    )


def closed_reasoning(text: str, template: Template) -> str | None:
    """Return the reasoning, or None if it is not closed exactly once; the opening tag may be in the prompt."""
    closing = _REASONING_TAGS[template][1]
    if text.count(closing) != 1:
        return None
    return _OPENING.sub("", text.split(closing)[0], count=1).strip()


def extract_answer(text: str, template: Template, *, finished: bool = True) -> str | None:
    """Return the one answer that a completion gives, or None if it gives none or several.

    `think`: the text after the only `</think>`, or the part of it between `<answer>` and `</answer>`; an unfinished
    completion has no answer, because the rest of it may be missing. Other templates: the content of the only
    `<answer>...</answer>`, outside the reasoning.
    """
    if template == "think":
        _, closing, answer = text.partition("</think>")
        if not (finished and closing) or any(tag in answer for tag in _THINK):
            return None
        tagged = any(tag in answer for tag in _ANSWER)
        return _between_answer_tags(answer) if tagged else answer.strip() or None
    before, _, rest = text.partition("<answer>")
    if any(tag in rest.replace("</answer>", "") for tag in _OWN_TAGS[template]):
        return None
    opening, end = _REASONING_TAGS[template]
    if opening in before and end not in before:
        return None
    return _between_answer_tags(text)


def _between_answer_tags(text: str) -> str | None:
    """The content of the only `<answer>...</answer>` of a text."""
    if any(text.count(tag) != 1 for tag in _ANSWER):
        return None
    inside, closing, _ = text.partition("<answer>")[2].partition("</answer>")
    return (inside.strip() or None) if closing else None


def reasoning_words(text: str) -> int:
    """Count the words of the reasoning in either template; up to the end of the text if it is not closed."""
    opened = _OPENING.sub("", text, count=1)
    # MPAR2's <reasoning> is inside its <thinking>, and its review counts as reasoning.
    end = r"</thinking>" if "<thinking>" in text else r"</(?:think|reasoning)>"
    reasoning = re.split(end, opened, maxsplit=1)[0]
    return len(re.findall(r"\w[\w'-]*", re.sub(r"</?\w+>", " ", reasoning)))


def _says_something(part: str) -> bool:
    return any(character.isalnum() for character in part)
