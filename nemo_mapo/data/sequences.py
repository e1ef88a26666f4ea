"""Positions in a row of prompt + completion; the only place that shifts by one.

A row holds the prompt at 0..P-1 and the completion y_1..y_T at P..P+T-1. Everything indexed by a completion token
(log-probability, entropies, attention query) is read at the position that predicts it, P+t-2 for y_t.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.rows import Prompt, Row
from nemo_mapo.types import AudioBatch, RolloutBatch, TokenBatch

PADDING_SEGMENT, SEQUENCE_SEGMENT = 0, 1
Rows = slice | list[int]
"""Some rows of a batch, in that order."""


def token_batch(rows: Sequence[Row], *, pad_id: int) -> TokenBatch:
    """Batch rows without gaps and right-padded: `token_batch(training_rows(groups), pad_id=0)`."""
    audio, audio_row = audio_of([row.prompt for row in rows])
    whole = [torch.cat([row.prompt.token_ids, row.token_ids]) for row in rows]
    return TokenBatch(
        tokens=pad_sequence(whole, batch_first=True, padding_value=pad_id),
        prompt_lengths=torch.tensor([len(row.prompt) for row in rows]),
        completion_lengths=torch.tensor([len(row.token_ids) for row in rows]),
        audio=audio,
        audio_row=audio_row,
    )


def audio_of(prompts: Sequence[Prompt]) -> tuple[AudioBatch, Int[Tensor, " batch *clips"]]:
    """The distinct clips of prompts, each once, and the rows of each prompt's clips among them, padded with -1."""
    clips = {id(clip): clip for prompt in prompts for clip in prompt.clips}
    number = {name: row for row, name in enumerate(clips)}
    heard = [[number[id(clip)] for clip in prompt.clips] for prompt in prompts]
    most = max([1, *map(len, heard)])
    rows = torch.tensor([[*row, *[-1] * (most - len(row))] for row in heard], dtype=torch.int64)
    return audio_batch(list(clips.values())), rows.squeeze(1) if most == 1 else rows


def audio_batch(clips: Sequence[Float[Tensor, "_"]]) -> AudioBatch:
    """Clips in the encoder's input form."""
    return AudioBatch(
        waveforms=pad_sequence(list(clips), batch_first=True) if clips else torch.zeros(0, 0),
        lengths=torch.tensor([len(clip) for clip in clips], dtype=torch.int64),
    )


def padded(values: Sequence[Shaped[Tensor, "_"]], fill: int | float = 0) -> Shaped[Tensor, "batch time"]:
    """Right-padded rows of one value per token."""
    return pad_sequence(list(values), batch_first=True, padding_value=fill)


def left_padded(
    prompts: Sequence[Prompt], *, pad_id: int
) -> tuple[Int[Tensor, "batch width"], Int[Tensor, "batch width"]]:
    """Prompts at the right edge, as one pass over a batch of them reads them; segment ids are 0 on the padding."""
    width = max(map(len, prompts))
    segments = [[PADDING_SEGMENT] * (width - len(one)) + [SEQUENCE_SEGMENT] * len(one) for one in prompts]
    tokens = pad_sequence(
        [one.token_ids for one in prompts], batch_first=True, padding_value=pad_id, padding_side="left"
    )
    return tokens, torch.tensor(segments)


def response_mask(completion_lengths: Int[Tensor, " batch"], num_tokens: int) -> Bool[Tensor, "batch time"]:
    """True on the tokens that were generated."""
    return torch.arange(num_tokens, device=completion_lengths.device) < completion_lengths[:, None]


def next_tokens(tokens: Int[Tensor, "batch sequence"]) -> Int[Tensor, "batch sequence"]:
    """The token that each position predicts; the last position predicts nothing and gets its own token."""
    return torch.cat([tokens[:, 1:], tokens[:, -1:]], dim=1)


def at_predicting_positions(
    values: Float[Tensor, "row sequence"], sequences: TokenBatch, *, packed: bool = False
) -> Float[Tensor, "batch time"]:
    """Read `values` for each completion token at the position that predicts it; 0 past the completion's end.

    `packed` values are in one row, sequence after sequence (`packed_row`).
    """
    num_tokens = int(sequences.completion_lengths.max())
    offsets = torch.arange(num_tokens, device=values.device)
    first = sequences.prompt_lengths[:, None] - 1
    if packed:
        lengths = sequences.prompt_lengths + sequences.completion_lengths
        first = first + (lengths.cumsum(0) - lengths)[:, None]
        values = values.expand(len(lengths), -1)
    positions = (first + offsets).clamp(max=values.shape[1] - 1)
    mask = response_mask(sequences.completion_lengths, num_tokens)
    return values.gather(1, positions).masked_fill(~mask, 0.0)


def packed_row(sequences: TokenBatch) -> tuple[Int[Tensor, "1 sequence"], Int[Tensor, " batch"]]:
    """All rows one after the other without padding, and their lengths."""
    lengths = sequences.prompt_lengths + sequences.completion_lengths
    valid = torch.arange(sequences.tokens.shape[1], device=lengths.device) < lengths[:, None]
    return sequences.tokens[valid][None], lengths


@dataclass(frozen=True, kw_only=True)
class SharedRow:
    """All rows in one, in which neighbours with the same prompt share it: `[prompt | completion | completion | ...]`.

    What is shared is x_1..x_{P-1}. Each completion brings the tokens that predict it, x_P and y_1..y_{T-1}, so every
    one of its positions predicts exactly one of its tokens, and y_T, which predicts nothing, is not read at all.
    """

    tokens: Int[Tensor, "1 sequence"]
    positions: Int[Tensor, " sequence"]
    """Of each token in its own prompt + completion."""
    lengths: Int[Tensor, " group"]
    """Tokens of each group."""
    leaders: Int[Tensor, " group"]
    """First row of each group, whose prompt and clips are the group's."""
    read_at: Int[Tensor, " read"]
    """Where in the row each completion token is predicted, completion after completion."""
    targets: Int[Tensor, "1 read"]
    """The completion tokens."""


def shared_row(sequences: TokenBatch) -> SharedRow:
    """Lay rows out so that each prompt is read once for all neighbours that have it.

    shared_row(token_batch(rows, pad_id=0)).lengths.sum()  # tokens that the model reads
    """
    shares = same_prompt_as_before(sequences)
    prompts, completions = sequences.prompt_lengths.tolist(), sequences.completion_lengths.tolist()
    columns, rows, reading = [], [], []
    lengths: list[int] = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        first = prompt - 1 if shares[row] else 0
        columns.append(torch.arange(first, prompt - 1 + completion))
        rows.append(torch.full((len(columns[-1]),), row))
        reading.append(columns[-1] >= prompt - 1)
        if shares[row]:
            lengths[-1] += completion
        else:
            lengths.append(prompt - 1 + completion)
    device = sequences.tokens.device
    column, read_at = torch.cat(columns).to(device), torch.cat(reading).nonzero().flatten().to(device)
    place = torch.cat(rows).to(device) * sequences.tokens.shape[1] + column
    flat = sequences.tokens.flatten()
    return SharedRow(
        tokens=flat[place][None],
        positions=column,
        lengths=torch.tensor(lengths, device=device),
        leaders=torch.tensor([row for row, shared in enumerate(shares) if not shared], device=device),
        read_at=read_at,
        targets=flat[place[read_at] + 1][None],
    )


def same_prompt_as_before(sequences: TokenBatch) -> list[bool]:
    """Whether each row has the prompt of the row before it, clips included."""
    tokens, lengths = sequences.tokens, sequences.prompt_lengths
    clips = sequences.audio_row.reshape(len(lengths), -1)
    beyond = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[1:, None]
    same = ((tokens[1:] == tokens[:-1]) | beyond).all(1) & (lengths[1:] == lengths[:-1])
    return [False, *(same & (clips[1:] == clips[:-1]).all(1)).tolist()]


def by_completion(
    values: Float[Tensor, " read"], completion_lengths: Int[Tensor, " batch"]
) -> Float[Tensor, "batch time"]:
    """Values of completion tokens, completion after completion, as right-padded rows; 0 past a completion's end."""
    mask = response_mask(completion_lengths, int(completion_lengths.max()))
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def select_rows(sequences: TokenBatch, rows: Rows) -> TokenBatch:
    """A part of the rows with only the audio they need, padded to their longest."""
    prompt_lengths = sequences.prompt_lengths[rows]
    completion_lengths = sequences.completion_lengths[rows]
    audio_row = sequences.audio_row[rows]
    clips, local_row = torch.unique(audio_row[audio_row >= 0], return_inverse=True)
    local_audio_row = torch.full_like(audio_row, -1)
    local_audio_row[audio_row >= 0] = local_row
    longest = int((prompt_lengths + completion_lengths).max())
    return TokenBatch(
        tokens=sequences.tokens[rows, :longest],
        prompt_lengths=prompt_lengths,
        completion_lengths=completion_lengths,
        audio=sequences.audio.select(clips),
        audio_row=local_audio_row,
    )


def select_batch(batch: RolloutBatch, rows: Rows) -> RolloutBatch:
    """A part of the rows of all fields; the time axis is shortened to the longest completion kept."""
    sequences = select_rows(batch.sequences, rows)
    longest = int(sequences.completion_lengths.max())

    def part(signal: Tensor | None) -> Tensor | None:
        if signal is None or signal.dim() == 1:
            return None if signal is None else signal[rows]
        return signal[rows, :longest]

    signals: dict[str, Any] = {name: part(signal) for name, signal in batch.each().items()}
    return RolloutBatch(sequences=sequences, **signals)


def rows_together(parts: Iterable[tuple[Rows, Shaped[Tensor, "*any part time"]]], num_rows: int) -> Tensor:
    """Join right-padded values of parts of the rows into those of all rows, `[..., num_rows, longest]`, padded with 0.

    rows_together([([0, 2], torch.ones(2, 3)), ([1], torch.ones(1, 5))], 3)  # [3, 5]
    """
    found = list(parts)
    first = found[0][1]
    longest = max(values.shape[-1] for _, values in found)
    whole: Tensor = first.new_zeros(*first.shape[:-2], num_rows, longest)
    for rows, values in found:
        whole[..., rows, : values.shape[-1]] = values
    return whole


def completion_tokens(sequences: TokenBatch) -> list[Int[Tensor, "_"]]:
    """The tokens of each completion, without padding."""
    bounds = zip(sequences.prompt_lengths.tolist(), sequences.completion_lengths.tolist(), strict=True)
    return [row[prompt : prompt + length] for row, (prompt, length) in zip(sequences.tokens, bounds, strict=True)]


def without_audio(sequences: TokenBatch) -> TokenBatch:
    """The same tokens without clips behind their placeholders."""
    return TokenBatch(
        tokens=sequences.tokens,
        prompt_lengths=sequences.prompt_lengths,
        completion_lengths=sequences.completion_lengths,
        audio=AudioBatch(waveforms=torch.zeros(0, 0), lengths=torch.zeros(0, dtype=torch.int64)),
        audio_row=torch.full_like(sequences.audio_row, -1),
    )


def drop_audio(sequences: TokenBatch, special: SpecialTokens) -> TokenBatch:
    """Rows whose prompts have neither placeholders nor markers of audio; completions stay unchanged, including audio
    tokens that the policy happened to sample."""
    tokens, column = sequences.tokens, torch.arange(sequences.tokens.shape[1], device=sequences.tokens.device)
    audio_ids = torch.tensor([special.audio_id, special.audio_start_id, special.audio_end_id], device=tokens.device)
    dropped = torch.isin(tokens, audio_ids) & (column < sequences.prompt_lengths[:, None])
    ends = sequences.prompt_lengths + sequences.completion_lengths
    kept = (column < ends[:, None]) & ~dropped
    return TokenBatch(
        tokens=padded([row[keep] for row, keep in zip(tokens, kept, strict=True)], special.pad_id),
        prompt_lengths=sequences.prompt_lengths - dropped.sum(1),
        completion_lengths=sequences.completion_lengths,
        audio=sequences.audio,
        audio_row=torch.full_like(sequences.audio_row, -1),
    )


def hide_clips(
    sequences: TokenBatch, special: SpecialTokens, *, text_only: Bool[Tensor, " batch"], silent: Bool[Tensor, " batch"]
) -> TokenBatch:
    """The same rows, some without their audio span (as the text-only reference reads them), some hearing silence.

    Each row has clips of its own; all stay in the batch, because which ones are encoded together decides the last bits.
    """
    clips = sequences.audio_row[silent]
    text = drop_audio(sequences, special)
    tokens = sequences.tokens.masked_fill(text_only[:, None], special.pad_id)
    tokens[text_only, : text.tokens.shape[1]] = text.tokens[text_only]
    return TokenBatch(
        tokens=tokens,
        prompt_lengths=torch.where(text_only, text.prompt_lengths, sequences.prompt_lengths),
        completion_lengths=sequences.completion_lengths,
        audio=AudioBatch(
            waveforms=sequences.audio.waveforms.index_fill(0, clips[clips >= 0], 0.0), lengths=sequences.audio.lengths
        ),
        audio_row=sequences.audio_row.masked_fill(text_only.view(-1, *[1] * (sequences.audio_row.dim() - 1)), -1),
    )


def row_slices(num_rows: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size` rows."""
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
