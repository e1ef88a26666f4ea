"""A corpus on which a language prior misleads: in training the text predicts the answer, elsewhere it does not.

The construction is that of VQA-CP. Each kind of sound has a usual word, which is the answer to a share of the training
questions about it; in validation and test every word is right equally often. The reasoning describes a clip coarsely
(kinds in their order), names the position of the sound in question, and then compares the choices: the evidence that
distinguishes them must be heard at that point, or remembered until then.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from transformers import PreTrainedTokenizerFast

from nemo_mapo.config.base import config_class
from nemo_mapo.embedded.synthetic import EVENT_SECONDS, Recipe, SyntheticClip, event_levels, event_times, generator
from nemo_mapo.embedded.synthetic_text import ATTRIBUTES, KINDS, PRIOR_ANSWERS, Event
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.types import Example

NAMED, AFTER = "named", "after"
"""Tasks: describe the only sound of a kind; describe, of two sounds of a kind, the one that follows another kind."""
SOUNDS = 3
PLACES = ("first", "second", "last")
USUAL_WORDS = {kind: PRIOR_ANSWERS[kind] for kind in KINDS}
CONTRADICTING = "contradicting"
"""Manifest of the test questions whose answers are not the usual words."""


@config_class
class PriorShiftConfig:
    """Everything the corpus depends on."""

    train: Annotated[int, Field(ge=0)] = 3000
    """Clips."""
    validation: Annotated[int, Field(ge=0)] = 300
    test: Annotated[int, Field(ge=0)] = 600
    seed: Annotated[int, Field(ge=0)] = 0
    usual_share: Annotated[float, Field(ge=0, le=1)] = 0.65
    """Share of training questions whose answer is the usual word of the kind; it is 1 in 4 in validation and test."""
    after_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of questions about the one of two sounds of a kind that follows another kind."""


@dataclass(frozen=True, kw_only=True)
class AskedSound:
    """The sound that a question is about."""

    kind: str
    place: int
    """Position among the sounds of its clip, from 0."""


def plan_prior_shift(config: PriorShiftConfig, split: str) -> list[SyntheticClip]:
    """The clips of a split; each depends only on (seed, split, number) and the shares."""
    size = {"train": config.train, "validation": config.validation, "test": config.test}[split]
    return [_plan_clip(config, split, number) for number in range(size)]


def _plan_clip(config: PriorShiftConfig, split: str, number: int) -> SyntheticClip:
    """Kinds and words are dealt round by round, so that validation and test hold each equally often."""
    name = f"{split}-{number:05d}"
    rng = generator(config.seed, "prior shift", name, "plan")
    # Of 16 questions in a row, each (kind, word) is asked once, in random order.
    pairs = [(kind, word) for kind in KINDS for word in ATTRIBUTES[kind]]
    turn, place = divmod(number, len(pairs))
    order = generator(config.seed, "prior shift", split, str(turn)).permutation(len(pairs))
    kind, word = pairs[int(order[place])]
    if split == "train":
        word = _skewed(kind, config.usual_share, rng)
    task = AFTER if rng.random() < config.after_share else NAMED
    kinds, asked = _arrangement(task, kind, rng)
    words = [str(rng.choice(ATTRIBUTES[other])) for other in kinds]
    for other in (place for place, same in enumerate(kinds) if same == kind and place != asked):
        # The other sound of the kind has another word, so that attending to the wrong one is an error.
        words[other] = str(rng.choice([choice for choice in ATTRIBUTES[kind] if choice != word]))
    words[asked] = word
    choices = rng.permutation(ATTRIBUTES[kind]).tolist()
    question = f"how does the {kind} sound?"
    if task == AFTER:
        question = f"how does the {kind} after the {kinds[asked - 1]} sound?"
    example = Example(id=name, question=question, choices=tuple(choices), answer=word, task=task)
    return SyntheticClip(example=example, events=_events(kinds, words, rng))


def _skewed(kind: str, usual_share: float, rng: np.random.Generator) -> str:
    usual = USUAL_WORDS[kind]
    if rng.random() < usual_share:
        return usual
    return str(rng.choice([word for word in ATTRIBUTES[kind] if word != usual]))


def _arrangement(task: str, kind: str, rng: np.random.Generator) -> tuple[list[str], int]:
    """Kinds in their order, and the position of the one that is asked about."""
    others = [other for other in rng.permutation(KINDS).tolist() if other != kind]
    if task == NAMED:
        place = int(rng.integers(SOUNDS))
        kinds = others[: SOUNDS - 1]
        kinds.insert(place, kind)
        return kinds, place
    if rng.random() < 0.5:
        return [others[0], kind, kind], 1
    return [kind, others[0], kind], 2


def _events(kinds: Sequence[str], words: Sequence[str], rng: np.random.Generator) -> tuple[Event, ...]:
    starts, durations = event_times(len(kinds), EVENT_SECONDS, rng)
    levels = event_levels(len(kinds), int(rng.integers(len(kinds))), rng)
    return tuple(
        Event(kind=kind, attribute=word, start_seconds=start, duration_seconds=duration, loudness=level)
        for kind, word, start, duration, level in zip(kinds, words, starts, durations, levels, strict=True)
    )


def asked_sound(clip: SyntheticClip) -> AskedSound:
    """The sound that the question of a clip is about."""
    kinds = [event.kind for event in clip.events]
    kind = next(kind for kind, words in ATTRIBUTES.items() if clip.example.answer in words)
    if clip.example.task == NAMED:
        return AskedSound(kind=kind, place=kinds.index(kind))
    before = next(other for other in kinds if other != kind)
    return AskedSound(kind=kind, place=kinds.index(before) + 1)


def description(kinds: Sequence[str]) -> str:
    """Name the kinds in their order, without detail: "i hear a tone first, then a sweep, and last a noise."."""
    return f"i hear a {kinds[0]} first, then a {kinds[1]}, and last a {kinds[2]}."


def completion(clip: SyntheticClip, belief: str) -> str:
    """Reasoning that concludes `belief`, and the answer; completions of a clip differ only in their beliefs."""
    asked = asked_sound(clip)
    verdicts = " ".join(f"is it {word}? {'yes' if word == belief else 'no'}." for word in ATTRIBUTES[asked.kind])
    thinking = f"{description([event.kind for event in clip.events])} the {asked.kind} asked about comes "
    return f"<think> {thinking}{PLACES[asked.place]}. {verdicts} so it seems {belief}.</think> {belief}"


def prior_shift_fields(clip: SyntheticClip, rng: np.random.Generator) -> dict[str, Any]:
    """Fields of a clip in the manifest besides its question and sounds."""
    return {
        "reasoning": completion(clip, clip.example.answer),
        "caption": description([event.kind for event in clip.events]),
        "completions": {choice: completion(clip, choice) for choice in clip.example.choices},
        "usual": USUAL_WORDS[asked_sound(clip).kind],
    }


def contradicts(clip: SyntheticClip) -> bool:
    """Whether the answer differs from the one that the text suggests."""
    return clip.example.answer != USUAL_WORDS[asked_sound(clip).kind]


def prior_shift_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer trained on the words of this corpus."""
    texts = [description(KINDS[:SOUNDS])]
    for kind, words in ATTRIBUTES.items():
        others = [other for other in KINDS if other != kind]
        texts += [f" how does the {kind} after the {others[0]} sound? choices: {', '.join(words)}."]
        texts += [f" is it {word}? yes. no. so it seems {word}.</think> {word}" for word in words]
    texts += [
        f"<think> i hear a {kind} first, the {kind} asked about comes {place}." for kind in KINDS for place in PLACES
    ]
    return build_tokenizer(texts)


def prior_shift_recipe(config: PriorShiftConfig) -> Recipe:
    """The corpus: train, validation, test, and the part of the test split that contradicts the usual words."""
    opposed = [clip for clip in plan_prior_shift(config, "test") if contradicts(clip)]

    def plan(name: str) -> list[SyntheticClip]:
        return opposed if name == CONTRADICTING else plan_prior_shift(config, name)

    sizes = {"train": config.train, "validation": config.validation, "test": config.test, CONTRADICTING: len(opposed)}
    modules = ("synthetic.py", "synthetic_audio.py", "synthetic_text.py", "tokenizer.py", "prior_shift.py")
    return Recipe(
        config=config,
        sizes=sizes,
        plan=plan,
        fields=prior_shift_fields,
        tokenizer=prior_shift_tokenizer,
        modules=modules,
    )
