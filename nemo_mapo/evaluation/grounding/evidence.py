"""Evidence masking: silence the parts of a clip that a completion listened to, or others, and ask again (Table 4)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from nemo_mapo.evaluation.grounding.listening import Listening
from nemo_mapo.rows import Problem, Prompt

Selection = Literal["top", "random", "low"]
SELECTIONS: tuple[Selection, ...] = ("top", "random", "low")
"""Frames with the most attention; as many in equally long runs at random positions; frames with the least attention."""


def choose_frames(
    attention: Float[NDArray[np.float64], " frame"], ratio: float, selection: Selection, rng: np.random.Generator
) -> Bool[NDArray[np.bool_], " frame"]:
    """The frames of one clip to silence: ceil(ratio * frames) of them, whatever the selection.

    Random frames come in runs with the same lengths as those of the top frames, in random order and at random
    positions: they differ from the top frames only in position. Ties in attention are ranked by position.
    """
    total = len(attention)
    count = math.ceil(ratio * total)
    order = np.argsort(-attention if selection != "low" else attention, kind="stable")
    chosen = np.zeros(total, dtype=np.bool_)
    chosen[order[:count]] = True
    return _moved(chosen, rng) if selection == "random" else chosen


def _moved(chosen: Bool[NDArray[np.bool_], " frame"], rng: np.random.Generator) -> Bool[NDArray[np.bool_], " frame"]:
    """The same runs in random order, with the free frames distributed at random over the gaps between them."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(np.int8), [0]])))
    runs = rng.permutation(edges[1::2] - edges[::2])
    spare = len(chosen) - int(runs.sum()) - (len(runs) - 1)
    # Runs and spare frames in random order; between two runs comes one more frame, which keeps them apart.
    slots = np.sort(rng.choice(spare + len(runs), size=len(runs), replace=False))
    moved = np.zeros_like(chosen)
    placed = 0
    for slot, length in zip(slots, runs, strict=True):
        # `placed` counts the frames of earlier runs; the separating frames are the ones that no slot stands for.
        start = int(slot) + placed
        moved[start : start + length] = True
        placed += int(length)
    return moved


def silence_frames(
    problems: Sequence[Problem], listening: Sequence[Listening], ratio: float, selection: Selection, *, seed: int
) -> list[Problem]:
    """The problems, each with the chosen part of its clip silenced; lengths do not change.

    Frame i of n stands for samples [ceil(i L / n), ceil((i + 1) L / n)) of a clip of L. The encoder's receptive field
    extends slightly beyond that range. Each problem silences its own frames, even if several share a clip.
    """
    return [
        replace(problem, prompt=_silenced(problem.prompt, heard.frames, ratio, selection, seed))
        for problem, heard in zip(problems, listening, strict=True)
    ]


def _silenced(
    prompt: Prompt, attention: Float[Tensor, " frame"], ratio: float, selection: Selection, seed: int
) -> Prompt:
    (clip,) = prompt.clips
    # One random stream per question: its frames do not depend on the others of the batch.
    rng = np.random.default_rng([seed, *prompt.id.encode()])
    chosen = choose_frames(attention.double().numpy(), ratio, selection, rng)
    frame_of_sample = (np.arange(len(clip)) * len(chosen)) // len(clip)
    return replace(prompt, clips=(clip.masked_fill(torch.from_numpy(chosen[frame_of_sample]), 0.0),))
