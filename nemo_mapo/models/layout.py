"""The model's door: rows become padded, packed or shared-prompt tensors here, and what a pass says is read back by row.

A row is a prompt x_1..x_P and a completion y_1..y_T. Everything indexed by a completion token (log-probability,
entropies, attention query) is read at the position that predicts it: x_P for y_1, y_{t-1} for y_t. This is the only
place that shifts by one.

    parts = batching.split(rows)
    inputs = batching.lay_out([rows[number] for number in parts[0]], model)
    inputs.by_row(inputs.call(model, None).logits)  # one [time, vocab] per row
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemo_mapo.attention.session import HeadReduction
from nemo_mapo.config.model import ModelConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.packing import pack_rows, pack_shared_rows
from nemo_mapo.models.pipeline import from_last_stage
from nemo_mapo.rows import Prompt, Row, ScoredRow, TokenSignals
from nemo_mapo.types import AudioBatch, ObjectiveInputs, Remembered

PADDING_SEGMENT, SEQUENCE_SEGMENT = 0, 1
T = TypeVar("T")


class Span(NamedTuple):
    """Where a row stands among all positions that a pass reads, counted row after row of its tensor."""

    prompt: int
    """The prompt's first position; `first` if the row before brought the prompt."""
    first: int
    """The position that predicts y_1; those of the other tokens follow it."""
    tokens: int
    """T, the completion's tokens."""


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """Arguments of one model call, and the tokens whose log-probabilities are asked for."""

    tokens: Int[Tensor, "row time"]
    targets: Int[Tensor, "row read"]
    """The token that each position predicts; with `read_at`, those of the positions read."""
    audio: AudioBatch
    audio_row: Int[Tensor, " sequence *clips"]
    packed_lengths: Int[Tensor, " sequence"] | None = None
    positions: Int[Tensor, " time"] | None = None
    """Of each token in its own prompt + completion, if completions share their prompts."""
    read_at: Int[Tensor, " read"] | None = None
    spans: tuple[Span, ...]

    def call(self, model: Callable[..., Any], head_reduction: HeadReduction | None) -> Any:
        """Run the model, or what wraps it; `head_reduction` None captures no audio mass."""
        return model(
            self.tokens,
            self.audio,
            self.audio_row,
            packed_lengths=self.packed_lengths,
            positions=self.positions,
            read_at=self.read_at,
            audio_mass=head_reduction,
        )

    def by_row(self, values: Shaped[Tensor, "row read *each"]) -> list[Shaped[Tensor, "_ *each"]]:
        """What the pass gave at each position that it read, for every row's completion tokens."""
        flat = values.flatten(0, 1)
        # Only predicting positions are read with `read_at`, one after the other.
        firsts = [span.first for span in self.spans] if self.read_at is None else _starts(self.spans)
        return [flat[first : first + span.tokens] for first, span in zip(firsts, self.spans, strict=True)]

    def to(self, device: torch.device) -> "ModelInputs":
        """Copy to `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | AudioBatch)
        }
        return replace(self, **moved)


def _starts(spans: Sequence[Span]) -> list[int]:
    return [0, *accumulate(span.tokens for span in spans)][:-1]


@dataclass(frozen=True, kw_only=True)
class MicroBatching:
    """How rows go through the model: a number at a time, or packed up to a token budget; prompts shared or not."""

    rows: int
    packed_tokens: int | None = None
    shared_prompts: bool = False
    """Neighbours with the same prompt read it once, in one row: `[prompt | completion | completion | ...]`."""

    @classmethod
    def of(cls, model: ModelConfig) -> "MicroBatching":
        """As the config says."""
        return cls(rows=model.micro_batch_size, packed_tokens=model.packed_tokens, shared_prompts=model.shared_prompts)

    def split(self, rows: Sequence[Row]) -> list[list[int]]:
        """Numbers of the rows of each pass; ValueError if a row does not fit the token budget."""
        if self.packed_tokens is None:
            return in_parts(list(range(len(rows))), self.rows)
        if not self.shared_prompts:
            return pack_rows(list(map(len, rows)), self.packed_tokens)
        prompts, completions = [len(row.prompt) for row in rows], [len(row.token_ids) for row in rows]
        return pack_shared_rows(prompts, completions, shares_prompt(rows), self.packed_tokens)

    def lay_out(self, rows: Sequence[Row], model: AudioLLM) -> ModelInputs:
        """The rows of one pass as the model reads them, on its device: separate, or all in one row."""
        if self.shared_prompts:
            return _shared(rows).to(model.device)
        return (_padded(rows, model.fill_id) if self.packed_tokens is None else _packed(rows)).to(model.device)


PADDED_ROWS = MicroBatching(rows=1)
"""A row each, right-padded."""


def in_parts(items: Sequence[T], size: int) -> list[list[T]]:
    """Consecutive parts of at most `size` items: `in_parts([1, 2, 3], 2)` is `[[1, 2], [3]]`."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def in_row_order(parts: Sequence[Sequence[int]], read: Iterable[Sequence[T]]) -> list[T]:
    """What was read for the rows of each part, in the order of the rows.

    in_row_order([[2, 0], [1]], [["c", "a"], ["b"]])  # ["a", "b", "c"]
    """
    found: dict[int, T] = {}
    for numbers, values in zip(parts, read, strict=True):
        found |= zip(numbers, values, strict=True)
    return [found[number] for number in range(len(found))]


def _whole(row: Row) -> Int[Tensor, " time"]:
    return torch.cat([row.prompt.token_ids, row.token_ids])


def _padded(rows: Sequence[Row], fill: int) -> ModelInputs:
    tokens = padded([_whole(row) for row in rows], fill)
    audio, audio_row = audio_of([row.prompt for row in rows])
    starts = range(0, tokens.numel(), tokens.shape[1])
    return ModelInputs(
        tokens=tokens,
        targets=next_tokens(tokens),
        audio=audio,
        audio_row=audio_row,
        spans=tuple(_span(start, row) for start, row in zip(starts, rows, strict=True)),
    )


def _packed(rows: Sequence[Row]) -> ModelInputs:
    tokens, lengths = torch.cat([_whole(row) for row in rows])[None], list(map(len, rows))
    audio, audio_row = audio_of([row.prompt for row in rows])
    starts = [0, *accumulate(lengths)][:-1]
    return ModelInputs(
        tokens=tokens,
        targets=next_tokens(tokens),
        audio=audio,
        audio_row=audio_row,
        packed_lengths=torch.tensor(lengths),
        spans=tuple(_span(start, row) for start, row in zip(starts, rows, strict=True)),
    )


def _span(start: int, row: Row) -> Span:
    return Span(prompt=start, first=start + len(row.prompt) - 1, tokens=len(row.token_ids))


def _shared(rows: Sequence[Row]) -> ModelInputs:
    """All rows in one, in which neighbours with the same prompt share it.

    What is shared is x_1..x_{P-1}. Each completion brings the tokens that predict it, x_P and y_1..y_{T-1}, so every
    one of its positions predicts exactly one of its tokens, and y_T, which predicts nothing, is not read at all.
    """
    tokens, positions, spans = [], [], []
    lengths: list[int] = []
    leaders: list[Prompt] = []
    end = 0
    for row, shares in zip(rows, shares_prompt(rows), strict=True):
        last = len(row.prompt) - 1
        first = last if shares else 0
        positions.append(torch.arange(first, last + len(row.token_ids)))
        tokens.append(_whole(row)[first:-1])
        spans.append(Span(prompt=end, first=end + last - first, tokens=len(row.token_ids)))
        end += len(tokens[-1])
        if shares:
            lengths[-1] += len(tokens[-1])
        else:
            lengths.append(len(tokens[-1]))
            leaders.append(row.prompt)
    audio, audio_row = audio_of(leaders)
    return ModelInputs(
        tokens=torch.cat(tokens)[None],
        targets=torch.cat([row.token_ids for row in rows])[None],
        audio=audio,
        audio_row=audio_row,
        packed_lengths=torch.tensor(lengths),
        positions=torch.cat(positions),
        read_at=torch.cat([torch.arange(span.first, span.first + span.tokens) for span in spans]),
        spans=tuple(spans),
    )


def shares_prompt(rows: Sequence[Row]) -> list[bool]:
    """Whether each row has the prompt of the row before it, clips included."""
    return [number > 0 and row.prompt.is_same(rows[number - 1].prompt) for number, row in enumerate(rows)]


def next_tokens(tokens: Int[Tensor, "batch sequence"]) -> Int[Tensor, "batch sequence"]:
    """The token that each position predicts; the last position predicts nothing and gets its own token."""
    return torch.cat([tokens[:, 1:], tokens[:, -1:]], dim=1)


def known_to_all_stages(
    read: Sequence[Float[Tensor, "*signals _"]] | None, rows: Sequence[Row], model: AudioLLM, *signals: int
) -> list[Float[Tensor, "*signals _"]]:
    """On the CPU, what the last pipeline stage read of some rows; the others give None and how many signals it is."""
    lengths = [len(row.token_ids) for row in rows]
    joined = None if read is None else torch.cat(list(read), dim=-1)
    whole = from_last_stage(joined, (*signals, sum(lengths)), torch.zeros(0, device=model.device))
    return list(torch.split(whole.cpu(), lengths, dim=-1))


def objective_inputs(
    rows: Sequence[ScoredRow], now: Sequence[TokenSignals], *, global_sequences: int, global_tokens: int
) -> ObjectiveInputs:
    """One micro-batch of the objective, right-padded: what is known of its rows, and what the policy says of them now.

    pi_old of rows without `old_log_probs` is the policy itself.
    """
    log_probs, mass = padded([one.log_probs for one in now]), _column([one.audio_mass for one in now])
    remembered: dict[str, Any] = {
        signal.name: _column([vars(row)[signal.name] for row in rows], log_probs.device)
        for signal in fields(Remembered)
    }
    if remembered["old_log_probs"] is None:
        remembered["old_log_probs"] = log_probs.detach()
    return ObjectiveInputs(
        response_mask=padded([torch.ones_like(one.log_probs, dtype=torch.bool) for one in now]),
        log_probs=log_probs,
        entropy_nats=padded([one.entropy_nats for one in now]).detach(),
        audio_mass=mass,
        global_sequences=global_sequences,
        global_tokens=global_tokens,
        **remembered,
    )


def _column(
    values: Sequence[Shaped[Tensor, "..."] | None], device: torch.device | None = None
) -> Shaped[Tensor, "batch ..."] | None:
    """One signal of all rows: a number each, or one per token; None if no row has it."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    assert len(there) == len(values), "a signal is known of all rows of a micro-batch or of none"
    return (torch.stack(there) if there[0].dim() == 0 else padded(there)).to(device)


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
