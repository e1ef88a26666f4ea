"""Signals of one forward pass for every completion token: log-probability, entropy, audio mass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemo_mapo.attention.session import Deafness, HeadReduction
from nemo_mapo.config.model import ModelConfig
from nemo_mapo.data.sequences import (
    Rows,
    at_predicting_positions,
    by_completion,
    completion_tokens,
    next_tokens,
    packed_row,
    padded,
    row_slices,
    same_prompt_as_before,
    select_rows,
    shared_row,
)
from nemo_mapo.models.audio_llm import AudioLLM, AudioLLMOutput
from nemo_mapo.models.pipeline import forward_all_stages, from_last_stage
from nemo_mapo.objective.logprobs import log_probs_and_entropy
from nemo_mapo.rollout.deaf import DeafTokens
from nemo_mapo.rollout.scoring import Drawing, drawn_log_probs
from nemo_mapo.training.deaf import deaf_positions
from nemo_mapo.training.packing import pack_rows, pack_shared_rows
from nemo_mapo.types import AudioBatch, TokenBatch

LOGIT_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
"""Logits upcast together, by kind of device: what stays in a core's cache (1 MiB of float32; measured, see
docs/benchmarks.md), and enough to keep a GPU busy (256 MiB; not measured)."""
FEWEST_ROWS = 2
"""The least that the pass takes at a time."""


@dataclass(frozen=True, kw_only=True)
class MicroBatching:
    """How rows go through the model: a number at a time, or packed up to a token budget; prompts shared or not."""

    rows: int
    packed_tokens: int | None = None
    shared_prompts: bool = False
    """Neighbours with the same prompt read it once, in one row (`data.sequences.SharedRow`)."""

    @classmethod
    def of(cls, model: ModelConfig) -> "MicroBatching":
        """As the config says."""
        return cls(rows=model.micro_batch_size, packed_tokens=model.packed_tokens, shared_prompts=model.shared_prompts)

    def split(self, sequences: TokenBatch) -> Sequence[Rows]:
        """Rows of each pass; ValueError if a row does not fit the token budget."""
        prompts, completions = sequences.prompt_lengths.tolist(), sequences.completion_lengths.tolist()
        if self.packed_tokens is None:
            return row_slices(len(prompts), self.rows)
        if self.shared_prompts:
            return pack_shared_rows(prompts, completions, same_prompt_as_before(sequences), self.packed_tokens)
        return pack_rows((sequences.prompt_lengths + sequences.completion_lengths).tolist(), self.packed_tokens)

    def lay_out(self, sequences: TokenBatch) -> "ModelInputs":
        """The rows of one pass as the model reads them: separate, or all in one row."""
        if self.shared_prompts:
            return _shared(sequences)
        return ModelInputs.of(sequences, packed=self.packed_tokens is not None)


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
    read_at: Int[Tensor, " read"] | None = None

    @classmethod
    def of(cls, sequences: TokenBatch, *, packed: bool = False) -> "ModelInputs":
        """The rows unchanged, or one after the other in a single row."""
        tokens, lengths = packed_row(sequences) if packed else (sequences.tokens, None)
        return cls(
            tokens=tokens,
            targets=next_tokens(tokens),
            audio=sequences.audio,
            audio_row=sequences.audio_row,
            packed_lengths=lengths,
        )

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


def _shared(sequences: TokenBatch) -> ModelInputs:
    row = shared_row(sequences)
    return ModelInputs(
        tokens=row.tokens,
        targets=row.targets,
        audio=sequences.audio,
        audio_row=sequences.audio_row[row.leaders],
        packed_lengths=row.lengths,
        positions=row.positions,
        read_at=row.read_at,
    )


PADDED_ROWS = MicroBatching(rows=1)
"""A row each, right-padded."""


@dataclass(frozen=True, kw_only=True)
class TokenSignals:
    """Per completion token, read at the position that predicts it; 0 past the completion's end."""

    log_probs: Float[Tensor, "batch time"]
    entropy_nats: Float[Tensor, "batch time"]
    audio_mass: Float[Tensor, "batch time"] | None
    drawn_log_probs: Float[Tensor, "batch time"] | None = None
    """log mu under the distribution that an engine draws from; None if it was not asked for."""

    @classmethod
    def unread(cls, sequences: TokenBatch, *, mass: bool, drawn: bool = False) -> "TokenSignals":
        """0 on every completion token, with the signals that are asked for, to be filled by `put`."""
        shape = (len(sequences.prompt_lengths), int(sequences.completion_lengths.max()))
        return cls(
            log_probs=torch.zeros(shape),
            entropy_nats=torch.zeros(shape),
            audio_mass=torch.zeros(shape) if mass else None,
            drawn_log_probs=torch.zeros(shape) if drawn else None,
        )

    def stacked(self) -> Float[Tensor, "signal batch time"]:
        """The signals that are there, in the order of the fields."""
        return torch.stack(self._there())

    def put(self, rows: Rows, read: Float[Tensor, "signal part part_time"]) -> None:
        """Store the signals of some rows, stacked as by `stacked`; later signals stay unchanged."""
        for signal, values in zip(self._there(), read, strict=False):
            signal[rows, : values.shape[1]] = values.to(signal)

    def _there(self) -> list[Tensor]:
        return [signal for signal in vars(self).values() if signal is not None]


def token_signals(
    model: AudioLLM,
    sequences: TokenBatch,
    *,
    head_reduction: HeadReduction | None,
    batching: MicroBatching = PADDED_ROWS,
) -> TokenSignals:
    """Run a model of one pipeline stage on prompt + completion rows; differentiable in log-probability and mass.

    All rows go through together, laid out as `batching` says; `head_reduction` None captures no audio mass.
    """
    sequences = sequences.to(model.device)
    inputs = batching.lay_out(sequences)
    return read_signals(model, inputs.call(model, head_reduction), inputs, sequences)


def read_signals(model: AudioLLM, output: AudioLLMOutput, inputs: ModelInputs, sequences: TokenBatch) -> TokenSignals:
    """Signals of a forward pass, on the last pipeline stage; equal on all tensor-parallel ranks."""
    log_probs, entropy = log_probs_and_entropy(
        output.logits,
        inputs.targets,
        chunk_size=max(FEWEST_ROWS, LOGIT_CHUNK_ELEMENTS[output.logits.device.type] // output.logits.shape[-1]),
        process_group=model.tensor_group,
        vocab_start=model.vocab_start,
    )
    mass = output.audio_mass
    return TokenSignals(
        log_probs=_of_completions(log_probs, inputs, sequences),
        entropy_nats=_of_completions(entropy, inputs, sequences),
        audio_mass=None if mass is None else _of_completions(mass, inputs, sequences),
    )


def _of_completions(
    values: Float[Tensor, "row read"], inputs: ModelInputs, sequences: TokenBatch
) -> Float[Tensor, "batch time"]:
    """What was read at each position, by the completion token that it predicts."""
    if inputs.read_at is not None:
        return by_completion(values[0], sequences.completion_lengths)
    return at_predicting_positions(values, sequences, packed=inputs.packed_lengths is not None)


@torch.no_grad()
def token_signals_in_parts(
    model: AudioLLM,
    sequences: TokenBatch,
    *,
    head_reduction: HeadReduction | None,
    batching: MicroBatching,
    drawing: Drawing | None = None,
    deaf: DeafTokens | None = None,
) -> TokenSignals:
    """`token_signals` without gradient, part by part, through all pipeline stages and known on all of them.

    With `drawing` the log-probs of the distribution that it draws from are among them. The tokens of `deaf` are
    predicted without attention to the audio.
    """
    signals = TokenSignals.unread(sequences, mass=head_reduction is not None, drawn=drawing is not None)
    for rows in batching.split(sequences):
        part = select_rows(sequences, rows)
        deaf_part = None if deaf is None else deaf.of(rows)
        signals.put(rows, _without_gradient(model, part, head_reduction, batching, drawing, deaf_part))
    return signals


def _without_gradient(
    model: AudioLLM,
    sequences: TokenBatch,
    head_reduction: HeadReduction | None,
    batching: MicroBatching,
    drawing: Drawing | None,
    deaf: DeafTokens | None,
) -> Float[Tensor, "signal batch time"]:
    """Log-probability, entropy and (if asked for) mass and log mu, stacked, on every pipeline stage."""
    sequences = sequences.to(model.device)
    inputs = batching.lay_out(sequences)
    blocked = None if deaf is None else deafness(deaf, inputs, sequences, model)
    output = inputs.call(partial(forward_all_stages, model, deaf=blocked), head_reduction)
    stacked = None
    if output is not None:
        signals = read_signals(model, output, inputs, sequences)
        drawn = None if drawing is None else _drawn(model, output, inputs, sequences, drawing)
        stacked = replace(signals, drawn_log_probs=drawn).stacked()
    signals_asked = 2 + (head_reduction is not None) + (drawing is not None)
    return known_to_all_stages(stacked, signals_asked, sequences, model)


def known_to_all_stages(
    stacked: Float[Tensor, "signal batch time"] | None, signals: int, sequences: TokenBatch, model: AudioLLM
) -> Float[Tensor, "signal batch time"]:
    """On the CPU, what the last pipeline stage read of some rows; the others give None and how many signals it is."""
    shape = (signals, len(sequences.prompt_lengths), int(sequences.completion_lengths.max()))
    return from_last_stage(stacked, shape, torch.zeros(0, device=model.device)).cpu()


def deafness(deaf: DeafTokens, inputs: ModelInputs, sequences: TokenBatch, model: AudioLLM) -> Deafness:
    """The positions of deaf tokens, which are given by row of `sequences`, in the rows that the model reads."""
    in_one_row = inputs.packed_lengths is not None
    positions = deaf_positions(
        deaf,
        sequences,
        read_at=inputs.read_at,
        packed_tokens=inputs.tokens.shape[1] if in_one_row else None,
    )
    return Deafness(queries=positions & (inputs.tokens != model.audio_token_id), layers=deaf.layers)


def _drawn(
    model: AudioLLM, output: AudioLLMOutput, inputs: ModelInputs, sequences: TokenBatch, drawing: Drawing
) -> Float[Tensor, "batch time"]:
    rows, width = output.logits.shape[:2]
    numbers = torch.arange(width, dtype=torch.float64, device=model.device).expand(rows, -1)
    firsts = _of_completions(numbers, inputs, sequences)[:, 0].long().tolist()
    in_one_row = inputs.packed_lengths is not None
    places = [(0 if in_one_row else row, first) for row, first in enumerate(firsts)]
    return padded(drawn_log_probs(model, output.logits, completion_tokens(sequences), places, drawing))
