"""Chat layout: question and audio placeholders as token ids, and the same rows without any trace of the audio."""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.data.tokenizer import ASSISTANT, AUDIO, AUDIO_END, AUDIO_START, USER, SpecialTokens
from nemo_mapo.types import Example


class WithoutAudio(NamedTuple):
    """Rows from which the audio span was dropped."""

    tokens: Int[Tensor, "batch shorter"]
    """Right-padded with the pad id to the longest row."""
    lengths: Int[Tensor, " batch"]
    removed: Int[Tensor, " batch"]
    """Tokens that each row lost: its old length minus its new one."""


def encode_prompt(example: Example, num_audio_tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of `<|user|><|audio_start|><|audio|>*N<|audio_end|> question choices: a, b.<|assistant|>`.

    A question without choices ends with itself. With `num_audio_tokens` = 0 the markers are left out too: the prompt of
    a text-only model. ValueError when the question or a choice spells a special token of the audio span.
    """
    span = f"{AUDIO_START}{AUDIO}{AUDIO_END}" if num_audio_tokens else ""
    choices = f" choices: {', '.join(example.choices)}." if example.choices else ""
    text = f" {example.question}{choices}"
    ids: list[int] = tokenizer.encode(f"{USER}{span}{text}{ASSISTANT}", add_special_tokens=False)
    special = SpecialTokens.from_tokenizer(tokenizer)
    found = sum(ids.count(token) for token in (special.audio_id, special.audio_start_id, special.audio_end_id))
    if found != (3 if num_audio_tokens else 0):
        raise ValueError(
            f"{example.id}: question or choices contain one of {AUDIO_START}, {AUDIO}, {AUDIO_END}, which stand for "
            f"audio: {text!r}; remove it from the manifest"
        )
    if not num_audio_tokens:
        return ids
    place = ids.index(special.audio_id)
    return [*ids[:place], *[special.audio_id] * num_audio_tokens, *ids[place + 1 :]]


def drop_audio_span(
    tokens: Int[Tensor, "batch time"],
    lengths: Int[Tensor, " batch"],
    special: SpecialTokens,
    *,
    prompt_lengths: Int[Tensor, " batch"] | None = None,
) -> WithoutAudio:
    """Take audio placeholders and their start and end markers out of right-padded rows, closing the gap.

    Works on prompts and on prompt + completion rows. Give `prompt_lengths` for the latter: then only the prompt is
    cleaned, and an audio token that the policy happened to sample stays, so completions keep their length.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    inside = positions < lengths[:, None]
    audio_ids = torch.tensor(
        [special.audio_id, special.audio_start_id, special.audio_end_id], dtype=tokens.dtype, device=tokens.device
    )
    dropped = inside & torch.isin(tokens, audio_ids)
    if prompt_lengths is not None:
        dropped &= positions < prompt_lengths[:, None]
    removed = dropped.sum(dim=1)
    kept = inside & ~dropped
    new_lengths = lengths - removed
    width = int(new_lengths.max()) if len(lengths) else 0
    # A stable sort by "not kept" moves the kept tokens of each row to its front, in order.
    order = torch.argsort((~kept).to(torch.int8), dim=1, stable=True)[:, :width]
    front = tokens.gather(1, order)
    padding = positions[:width] >= new_lengths[:, None]
    return WithoutAudio(tokens=front.masked_fill(padding, special.pad_id), lengths=new_lengths, removed=removed)
