"""Audio embeddings in TensorRT-LLM's form: rows of a table, referenced in the prompt by ids beyond the vocabulary."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemo_mapo.rows import Prompt


@dataclass(frozen=True, kw_only=True)
class EnginePrompts:
    """Prompts of one engine batch, each as often as its group has completions."""

    batch_input_ids: tuple[Int[Tensor, "_"], ...]
    """int32 on the CPU, without padding; id vocab_size + r stands for row r of the table."""
    prompt_table: Float[Tensor, "rows hidden"] | None
    """Frames of the clips one after the other, each clip once; None without audio."""
    prompt_tasks: str | None
    """"0,0,...": every prompt looks into the same table. None without audio."""


def pack_prompts(
    prompts: Sequence[Prompt],
    frames: Float[Tensor, "audio frames hidden"],
    frame_lengths: Int[Tensor, " audio"],
    audio_row: Int[Tensor, " batch *clips"],
    *,
    group_size: int,
    vocab_size: int,
    audio_token_id: int,
) -> EnginePrompts:
    """Put the audio of `prompts` into a table and its rows' ids into the prompts.

    Clips of unequal length are stored without padding; prompts that share a clip share its rows, and so do the
    completions of a group.

    Args:
        prompts: to complete.
        frames: embeddings of their clips (`audio_of`), right-padded.
        frame_lengths: valid frames of each.
        audio_row: rows of `frames` that each prompt hears, -1 is none.
        group_size: copies of each prompt, adjacent.
        vocab_size: of the engine.
        audio_token_id: the placeholder.

    Raises:
        ValueError: the number of placeholders of a prompt differs from the number of frames of its clip.
    """
    starts = (frame_lengths.cumsum(0) - frame_lengths).tolist()
    counts = frame_lengths.tolist()
    rows: list[Int[Tensor, "_"]] = []
    for prompt, heard in zip(prompts, audio_row.reshape(len(prompts), -1).tolist(), strict=True):
        ids = prompt.token_ids.clone()
        clips = [clip for clip in heard if clip >= 0]
        placeholders = ids == audio_token_id
        wanted, given = int(placeholders.sum()), sum(counts[clip] for clip in clips)
        if wanted != given:
            raise ValueError(f"prompt {prompt.id!r} has {wanted} audio placeholders, and its clip {given} frames")
        if clips:
            rows_of_clips = [vocab_size + starts[clip] + torch.arange(counts[clip]) for clip in clips]
            ids[placeholders] = torch.cat(rows_of_clips)
        rows.extend([ids.to(torch.int32)] * group_size)
    if not counts:
        return EnginePrompts(batch_input_ids=tuple(rows), prompt_table=None, prompt_tasks=None)
    valid = torch.arange(frames.shape[1], device=frames.device) < frame_lengths[:, None]
    return EnginePrompts(
        batch_input_ids=tuple(rows), prompt_table=frames[valid], prompt_tasks=",".join("0" for _ in rows)
    )


def engine_batches(table_rows: list[int], *, most_prompts: int, most_rows: int) -> Iterator[list[int]]:
    """Numbers of the prompts of each engine batch: neighbours, as many as fit.

    Args:
        table_rows: rows that each prompt needs in the table, at most `most_rows`.
        most_prompts: of a batch.
        most_rows: of a batch's table.
    """
    batch: list[int] = []
    rows = 0
    for number, needed in enumerate(table_rows):
        if batch and (len(batch) == most_prompts or rows + needed > most_rows):
            yield batch
            batch, rows = [], 0
        batch.append(number)
        rows += needed
    if batch:
        yield batch
