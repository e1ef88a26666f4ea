"""Evidence masking: silence the parts of a clip that a completion listened to, or others, and ask again (Table 4)."""

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from nemo_mapo.evaluation.grounding.listening import Listening
from nemo_mapo.types import AudioBatch, PromptBatch

Selection = Literal["top", "random", "low"]
SELECTIONS: tuple[Selection, ...] = ("top", "random", "low")
"""Frames with the most attention; as many in runs as long, placed at random; frames with the least attention."""


def choose_frames(
    attention: Float[NDArray[np.float64], " frame"], ratio: float, selection: Selection, rng: np.random.Generator
) -> Bool[NDArray[np.bool_], " frame"]:
    """The frames of one clip to be silenced: ceil(ratio * frames) of them, whatever the selection.

    Random frames stand in runs of the lengths that the top frames' runs have, in random order and at random places:
    they differ from those in where they are, and in nothing else. Equal attention ranks by position.
    """
    total = len(attention)
    count = math.ceil(ratio * total)
    order = np.argsort(-attention if selection != "low" else attention, kind="stable")
    chosen = np.zeros(total, dtype=np.bool_)
    chosen[order[:count]] = True
    return _moved(chosen, rng) if selection == "random" else chosen


def _moved(chosen: Bool[NDArray[np.bool_], " frame"], rng: np.random.Generator) -> Bool[NDArray[np.bool_], " frame"]:
    """The same runs in random order, the free frames spread over the gaps between them at random."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(np.int8), [0]])))
    runs = rng.permutation(edges[1::2] - edges[::2])
    spare = len(chosen) - int(runs.sum()) - (len(runs) - 1)
    # Runs and spare frames in random order; between two runs comes one more frame, which keeps them apart.
    slots = np.sort(rng.choice(spare + len(runs), size=len(runs), replace=False))
    moved = np.zeros_like(chosen)
    placed = 0
    for slot, length in zip(slots, runs, strict=True):
        # `placed` counts the frames of the runs before; the separating ones are those that slots leave out.
        start = int(slot) + placed
        moved[start : start + length] = True
        placed += int(length)
    return moved


def silence_frames(
    prompts: PromptBatch, listening: Listening, ratio: float, selection: Selection, *, seed: int
) -> PromptBatch:
    """The prompts with the chosen part of each clip silenced; lengths stay.

    Frame i of n stands for samples [ceil(i L / n), ceil((i + 1) L / n)) of a clip of L. The encoder may hear a little
    across that border, by its receptive field.

    Raises:
        ValueError: two prompts share a clip: what one listened to would be taken from the other.
    """
    if len(set(prompts.audio_row.tolist())) < len(prompts):
        raise ValueError("evidence masking needs one clip for each prompt")
    waveforms = prompts.audio.waveforms.clone()
    for row, clip in enumerate(prompts.audio_row.tolist()):
        frames, samples = int(listening.num_frames[row]), int(prompts.audio.lengths[clip])
        # A stream of its own for each question: its frames do not depend on the others of the batch.
        rng = np.random.default_rng([seed, *prompts.examples[row].id.encode()])
        chosen = choose_frames(listening.frames[row, :frames].double().numpy(), ratio, selection, rng)
        frame_of_sample = (np.arange(samples) * frames) // samples
        waveforms[clip, :samples][torch.from_numpy(chosen[frame_of_sample])] = 0.0
    return replace(prompts, audio=AudioBatch(waveforms=waveforms, lengths=prompts.audio.lengths))
