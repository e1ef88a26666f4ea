"""Positions of the deaf completion tokens in the rows that the model reads, for every row layout."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nemo_mapo.data.sequences import response_mask
from nemo_mapo.rollout.deaf import DeafTokens
from nemo_mapo.types import TokenBatch


def deaf_positions(
    deaf: DeafTokens,
    sequences: TokenBatch,
    *,
    read_at: Int[Tensor, " read"] | None = None,
    packed_tokens: int | None = None,
) -> Bool[Tensor, "row sequence"]:
    """True where a deaf token is predicted, and with `prompt_text` on the whole prompt before that.

    Args:
        deaf: by row of `sequences`.
        sequences: the rows; padded unless one of the others is given.
        read_at: where completion tokens are predicted in the one row whose completions share their prompts.
        packed_tokens: tokens of the one row that holds all sequences without padding, or with `read_at` shared prompts.
    """
    num_tokens = int(sequences.completion_lengths.max())
    written = response_mask(sequences.completion_lengths, num_tokens)
    rows = torch.arange(len(written), device=written.device)[:, None]
    chosen = deaf.includes(rows, torch.arange(num_tokens, device=written.device).expand_as(written))
    if read_at is not None:
        assert packed_tokens is not None, "shared prompts stand in one row of known length"
        assert deaf.text_rows is None, "a shared prompt is deaf to all of its completions or to none"
        shared = written.new_full((1, packed_tokens), deaf.prompt_text)
        shared[0, read_at] = chosen[written]
        return shared
    column = torch.arange(sequences.tokens.shape[1], device=written.device)
    number = column - (sequences.prompt_lengths[:, None] - 1)
    inside = (number >= 0) & (number < num_tokens)
    padded = chosen.gather(1, number.clamp(0, num_tokens - 1)) & inside
    if deaf.prompt_text:
        text = number < 0
        padded = padded | (text if deaf.text_rows is None else text & deaf.text_rows.to(text.device)[:, None])
    if packed_tokens is None:
        return padded
    kept = column < (sequences.prompt_lengths + sequences.completion_lengths)[:, None]
    return padded[kept][None]
