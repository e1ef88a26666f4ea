"""Words of the synthetic corpus: kinds of sound, questions, templated reasoning, the warm start's language prior."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_mapo.types import Example

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "tone": ("deep", "low", "high", "shrill"),
    "sweep": ("rising", "falling", "peaking", "dipping"),
    "noise": ("dull", "warm", "bright", "sharp"),
    "pulse": ("slow", "steady", "fast", "frantic"),
}
"""Kinds of sound and the four words that tell sounds of one kind apart."""

KINDS = tuple(ATTRIBUTES)
COUNT_WORDS = ("one", "two", "three", "four")
ORDER_WORDS = ("first", "last")
TASKS = ("attribute", "order", "loudness", "count")

PRIOR_ANSWERS: dict[str, str] = {
    "tone": "low",
    "sweep": "rising",
    "noise": "bright",
    "pulse": "steady",
    "order": "tone",
    "loudness": "noise",
    "count": "three",
}
"""The answers of a model that relies on its language prior: one word per kind (attribute task) or per task."""

LOUD_MARGIN_DB = 6.0
"""A sound is called loud if it is this much louder than every other sound of the clip."""

_UNIFORM_SHARE = 0.1
"""Share of warm-start beliefs that are drawn uniformly, so that no choice has probability zero."""

_OPENINGS = ("i hear", "i notice", "there is")
_ASKED = ("the question asks", "i am asked")


@dataclass(frozen=True, kw_only=True)
class Event:
    """One sound of a clip."""

    kind: str
    attribute: str
    start_seconds: float
    duration_seconds: float
    loudness: float
    """dB relative to full scale, of the loudest 40 ms (RMS)."""

    def __post_init__(self) -> None:
        if self.attribute not in ATTRIBUTES.get(self.kind, ()):
            raise ValueError(f"no such sound: kind={self.kind!r}, attribute={self.attribute!r}; known: {ATTRIBUTES}")


def events_from_custom(custom: Mapping[str, Any]) -> tuple[Event, ...]:
    """Read the `events` field of the synthetic manifests; ValueError if it is missing."""
    if "events" not in custom:
        raise ValueError("cut has no 'events' field: only manifests of the synthetic corpus describe their sounds")
    return tuple(Event(**event) for event in custom["events"])


def loudest_event(events: Sequence[Event]) -> Event | None:
    """Return the sound that is `LOUD_MARGIN_DB` louder than every other; None if none is, or it is the only one."""
    ranked = sorted(events, key=lambda event: event.loudness, reverse=True)
    if len(ranked) < 2 or ranked[0].loudness - ranked[1].loudness < LOUD_MARGIN_DB:
        return None
    return ranked[0]


def question_text(task: str, subject: str = "") -> str:
    """Return the question; `subject` is a kind (attribute task) or an order word (order task)."""
    match task:
        case "attribute":
            return f"how does the {subject} sound?"
        case "order":
            return f"which sound comes {subject}?"
        case "loudness":
            return "which sound is loudest?"
        case "count":
            return "how many sounds are there?"
    raise ValueError(f"unknown task {task!r}; one of {TASKS}")


def caption_text(events: Sequence[Event]) -> str:
    """Describe the sounds in their order, in one accurate sentence."""
    return _heard(events, _OPENINGS[0])


def reasoning_text(events: Sequence[Event], example: Example, belief: str, rng: np.random.Generator) -> str:
    """Reason from what is heard to `belief`: `<think> heard, asked, yes/no per choice, so ...</think> belief`.

    The description is always true; verdicts and conclusion follow `belief`, right or wrong. The choices are listed
    from deep to shrill, slow to frantic and so on, whatever their order in the question: copying a random order is what
    a small model learns last. `rng` picks the wording. ValueError if `belief` is not among the choices.
    """
    if belief not in example.choices:
        raise ValueError(f"{example.id}: belief {belief!r} is not among the choices {example.choices}")
    opening = _OPENINGS[int(rng.integers(len(_OPENINGS)))]
    asked = _ASKED[int(rng.integers(len(_ASKED)))]
    topic, option, conclusion = _phrases(example)
    verdicts = " ".join(
        f"is it {option.format(choice)}? {'yes' if choice == belief else 'no'}." for choice in _by_size(example)
    )
    thinking = f"{_heard(events, opening)} {asked} {topic}. {verdicts} so {conclusion.format(belief)}."
    return f"<think> {thinking}</think> {belief}"


def prior_answer(example: Example) -> str:
    """Return the language prior's answer to a synthetic question, whatever the clip."""
    if example.task != "attribute":
        return PRIOR_ANSWERS[example.task]
    return PRIOR_ANSWERS[_asked_kind(example)]


def warm_start_belief(example: Example, truth_share: float, rng: np.random.Generator) -> str:
    """Draw what a warm-start text concludes: the truth with p = `truth_share`, any choice with p = 0.1, else the prior.

    If the prior's word is not among the choices, it is any choice instead.
    """
    if not 0.0 <= truth_share <= 1.0:
        raise ValueError(f"{example.id}: truth share {truth_share} is outside [0, 1]")
    draw = float(rng.random())
    if draw < truth_share:
        return example.answer
    prior = prior_answer(example)
    if draw < truth_share + _UNIFORM_SHARE or prior not in example.choices:
        return example.choices[int(rng.integers(len(example.choices)))]
    return prior


def template_texts() -> Iterator[str]:
    """Yield texts with every word that the templates can produce, for training the tokenizer."""
    rng = np.random.default_rng(0)
    sounds = [
        Event(kind=kind, attribute=word, start_seconds=0.0, duration_seconds=0.5, loudness=-10.0 * rank)
        for rank, (kind, words) in enumerate(ATTRIBUTES.items())
        for word in words
    ]
    subjects = {"attribute": KINDS, "order": ORDER_WORDS, "loudness": ("",), "count": ("",)}
    for task, names in subjects.items():
        for name in names:
            choices = ATTRIBUTES[name] if task == "attribute" else COUNT_WORDS if task == "count" else KINDS
            example = Example(
                id=f"{task}-{name}",
                question=question_text(task, name),
                choices=choices,
                answer=choices[0],
                task=task,
            )
            for belief in choices:
                yield f" {example.question} choices: {', '.join(choices)}."
                for first in range(len(sounds)):
                    heard = [sounds[(first + step * len(KINDS)) % len(sounds)] for step in range(1 + first % 4)]
                    yield f" {caption_text(heard)}"
                    yield reasoning_text(heard, example, belief, rng)


def _heard(events: Sequence[Event], opening: str) -> str:
    """State the sounds in order: "i hear a deep tone first, then a loud peaking sweep, and last a dull noise."."""
    loudest = loudest_event(events)
    ordered = sorted(events, key=lambda event: event.start_seconds)
    names = [f"a {'loud ' if event is loudest else ''}{event.attribute} {event.kind}" for event in ordered]
    if len(names) == 1:
        return f"{opening} only {names[0]}."
    middle = "".join(f" then {name}," for name in names[1:-1])
    return f"{opening} {names[0]} first,{middle} and last {names[-1]}."


def _phrases(example: Example) -> tuple[str, str, str]:
    """Return the topic, how a choice is named, and the conclusion, the last two with a slot for a choice."""
    match example.task:
        case "attribute":
            kind = _asked_kind(example)
            return f"how the {kind} sounds", "{}", f"the {kind} seems {{}}"
        case "order":
            place = next((word for word in ORDER_WORDS if word in example.question), None)
            if place is None:
                raise ValueError(f"{example.id}: question {example.question!r} names none of {ORDER_WORDS}")
            return f"which sound comes {place}", "the {}", f"the {{}} seems {place}"
        case "loudness":
            return "which sound is loudest", "the {}", "the {} seems loudest"
        case "count":
            return "how many sounds there are", "{}", "the count seems {}"
    raise ValueError(f"{example.id}: unknown task {example.task!r}; one of {TASKS}")


def _by_size(example: Example) -> tuple[str, ...]:
    """Return the choices in the order in which this module lists them."""
    order = KINDS if example.task in ("order", "loudness") else COUNT_WORDS
    if example.task == "attribute":
        order = ATTRIBUTES[_asked_kind(example)]
    return tuple(sorted(example.choices, key=order.index))


def _asked_kind(example: Example) -> str:
    """Return the kind that an attribute question is about."""
    for kind, words in ATTRIBUTES.items():
        if set(words) == set(example.choices):
            return kind
    raise ValueError(f"{example.id}: choices {example.choices} are not the attribute words of one kind")
