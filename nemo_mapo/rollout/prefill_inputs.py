"""Prompts as one pass over a batch of them reads them: padded on the left, each clip once."""

import torch
from jaxtyping import Int
from torch import Tensor

from nemo_mapo.types import AudioBatch, PromptBatch

PADDING_SEGMENT, SEQUENCE_SEGMENT = 0, 1


def left_padded(
    tokens: Int[Tensor, "batch time"], lengths: Int[Tensor, " batch"], pad_id: int
) -> tuple[Int[Tensor, "batch width"], Int[Tensor, "batch width"]]:
    """Move right-padded rows to the right edge; segment ids are 0 on the padding."""
    width = int(lengths.max())
    source = torch.arange(width, device=tokens.device) - (width - lengths)[:, None]
    is_prompt = source >= 0
    moved = tokens.gather(1, source.clamp(min=0)).masked_fill(~is_prompt, pad_id)
    return moved, torch.where(is_prompt, SEQUENCE_SEGMENT, PADDING_SEGMENT)


def audio_of(prompts: PromptBatch, chosen: Int[Tensor, " chosen"]) -> tuple[AudioBatch, Int[Tensor, "chosen *clips"]]:
    """Clips of the chosen prompts, each once, and the row or rows of each prompt among them."""
    audio_row = prompts.audio_row[chosen]
    has_audio = audio_row >= 0
    clips, rows = torch.unique(audio_row[has_audio], return_inverse=True)
    return prompts.audio.select(clips), audio_row.masked_scatter(has_audio, rows)


def no_audio(device: torch.device) -> AudioBatch:
    """No clips."""
    return AudioBatch(
        waveforms=torch.zeros(0, 0, device=device), lengths=torch.zeros(0, dtype=torch.int64, device=device)
    )
