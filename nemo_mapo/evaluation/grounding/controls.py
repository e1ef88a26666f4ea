"""Controls: the same questions with the audio removed, silenced or exchanged, to see how much depends on it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from nemo_mapo.data.dataset import AudioTokenCount
from nemo_mapo.data.prompts import encode_prompt, without_audio
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.rows import Problem, Prompt
from nemo_mapo.types import Wording


def never_alone(batches: Iterable[list[Problem]]) -> Iterator[list[Problem]]:
    """The same problems in the same order, in batches of at least two, so that each can exchange its clip.

    A problem left over at the end joins the previous batch.
    """
    ready: list[Problem] = []
    held: list[Problem] = []
    for batch in batches:
        held = held + batch
        if len(held) > 1:
            if ready:
                yield ready
            ready, held = held, []
    if ready or held:
        yield ready + held


def refuse_several_clips(problems: Sequence[Problem]) -> None:
    """ValueError naming a prompt with several clips: exchanging or masking only some of them would be meaningless."""
    for problem in problems:
        if len(clips := problem.prompt.clips) > 1:
            raise ValueError(
                f"{problem.example.id} has {len(clips)} clips; grounding is analysed for questions about one clip"
            )


def silenced(problems: Sequence[Problem]) -> list[Problem]:
    """Every clip replaced by silence of its length."""
    return [replace(problem, prompt=problem.prompt.silenced()) for problem in problems]


def text_only(problems: Sequence[Problem], special: SpecialTokens) -> list[Problem]:
    """The questions alone, without audio span and markers, as the text-only reference reads them."""
    return [replace(problem, prompt=without_audio(problem.prompt, special)) for problem in problems]


def exchanged(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, audio_tokens: AudioTokenCount, wording: Wording
) -> list[Problem]:
    """Every question with another question's clip, one with a different answer if possible.

    ValueError if the batch has no different clips to exchange.
    """

    def about(problem: Problem, other: Problem) -> Problem:
        (clip,) = other.prompt.clips
        token_ids = encode_prompt(problem.example, audio_tokens(len(clip)), tokenizer, wording)
        prompt = Prompt(id=problem.prompt.id, token_ids=torch.tensor(token_ids), clips=(clip,))
        return replace(problem, prompt=prompt)

    changed = [
        about(problem, problems[other]) for problem, other in zip(problems, foreign_clips(problems), strict=True)
    ]
    refuse_own_clips(problems, changed)
    return changed


def foreign_clips(problems: Sequence[Problem]) -> list[int]:
    """For each problem the index of the one whose clip it gets: a rotation of the problems sorted by answer and clip.

    Of the rotations that give no problem its own clip, it is the one that gives most problems a clip with another
    answer.
    """
    sounds = [_sound(problem) for problem in problems]
    answers = [problem.example.answer for problem in problems]
    ranked = sorted(range(len(problems)), key=lambda row: (answers[row], sounds[row]))
    best, most = None, -1
    for shift in range(1, len(ranked)):
        pairs = list(zip(ranked, ranked[shift:] + ranked[:shift], strict=True))
        if any(sounds[row] == sounds[other] for row, other in pairs):
            continue
        different = sum(answers[row] != answers[other] for row, other in pairs)
        if different > most:
            best, most = dict(pairs), different
    if best is None:
        raise ValueError(
            f"the {len(problems)} clips of the batch that begins with {problems[0].example.id} cannot be exchanged so "
            "that no question hears its own or one that sounds the same: analyse more items, or set --batch-size higher"
        )
    return [best[row] for row in range(len(problems))]


def refuse_own_clips(problems: Sequence[Problem], changed: Sequence[Problem]) -> None:
    """ValueError naming a question that hears its own clip after the exchange."""
    for before, after in zip(problems, changed, strict=True):
        if _sound(before) == _sound(after):
            raise ValueError(f"{before.example.id} should hear the clip of another question but hears its own")


def _sound(problem: Problem) -> bytes:
    (clip,) = problem.prompt.clips
    return clip.numpy().tobytes()
