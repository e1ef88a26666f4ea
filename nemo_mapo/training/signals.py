"""What one forward pass says about every completion token: log-probability, entropy, audio mass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemo_mapo.attention.session import HeadReduction
from nemo_mapo.data.sequences import (
    Rows,
    at_predicting_positions,
    next_tokens,
    packed_row,
    row_slices,
    select_rows,
)
from nemo_mapo.models.audio_llm import AudioLLM, AudioLLMOutput
from nemo_mapo.models.pipeline import forward_all_stages, from_last_stage
from nemo_mapo.objective.logprobs import log_probs_and_entropy
from nemo_mapo.training.packing import pack_rows
from nemo_mapo.types import AudioBatch, TokenBatch

LOGIT_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
"""Logits upcast together, by kind of device: what stays in a core's cache (1 MiB of float32; measured, see
docs/benchmarks.md), and enough to keep a GPU busy (256 MiB; not measured)."""
_FEWEST_ROWS = 2
"""The least that the pass takes at a time."""


@dataclass(frozen=True, kw_only=True)
class MicroBatching:
    """How rows go through the model: so many padded ones at a time, or packed up to a number of tokens."""

    rows: int
    packed_tokens: int | None = None

    def split(self, sequences: TokenBatch) -> Sequence[Rows]:
        """Rows of each pass; ValueError where a row does not fit the token budget."""
        if self.packed_tokens is None:
            return row_slices(len(sequences.prompt_lengths), self.rows)
        return pack_rows((sequences.prompt_lengths + sequences.completion_lengths).tolist(), self.packed_tokens)


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """Arguments of one model call."""

    tokens: Int[Tensor, "row sequence"]
    audio: AudioBatch
    audio_row: Int[Tensor, "batch *clips"]
    packed_lengths: Int[Tensor, " batch"] | None

    @classmethod
    def of(cls, sequences: TokenBatch, *, packed: bool) -> "ModelInputs":
        """The rows as they are, or one after the other in a single row."""
        tokens, lengths = packed_row(sequences) if packed else (sequences.tokens, None)
        return cls(tokens=tokens, audio=sequences.audio, audio_row=sequences.audio_row, packed_lengths=lengths)


@dataclass(frozen=True, kw_only=True)
class TokenSignals:
    """Per completion token, read at the position that predicts it; 0 past the completion's end."""

    log_probs: Float[Tensor, "batch time"]
    entropy_nats: Float[Tensor, "batch time"]
    audio_mass: Float[Tensor, "batch time"] | None


def token_signals(
    model: AudioLLM, sequences: TokenBatch, *, head_reduction: HeadReduction | None, packed: bool = False
) -> TokenSignals:
    """Run a model of one pipeline stage on prompt + completion rows; differentiable in log-probability and mass.

    `head_reduction` None captures no audio mass.
    """
    sequences = sequences.to(model.device)
    inputs = ModelInputs.of(sequences, packed=packed)
    output = model(
        inputs.tokens,
        inputs.audio,
        inputs.audio_row,
        packed_lengths=inputs.packed_lengths,
        audio_mass=head_reduction,
    )
    return read_signals(model, output, inputs, sequences)


def read_signals(model: AudioLLM, output: AudioLLMOutput, inputs: ModelInputs, sequences: TokenBatch) -> TokenSignals:
    """Signals of a forward pass, on the last pipeline stage; equal on all tensor-parallel ranks."""
    log_probs, entropy = log_probs_and_entropy(
        output.logits,
        next_tokens(inputs.tokens),
        chunk_size=max(_FEWEST_ROWS, LOGIT_CHUNK_ELEMENTS[output.logits.device.type] // output.logits.shape[-1]),
        process_group=model.tensor_group,
        vocab_start=model.vocab_start,
    )
    packed, mass = inputs.packed_lengths is not None, output.audio_mass
    return TokenSignals(
        log_probs=at_predicting_positions(log_probs, sequences, packed=packed),
        entropy_nats=at_predicting_positions(entropy, sequences, packed=packed),
        audio_mass=None if mass is None else at_predicting_positions(mass, sequences, packed=packed),
    )


@torch.no_grad()
def token_signals_in_parts(
    model: AudioLLM, sequences: TokenBatch, *, head_reduction: HeadReduction | None, batching: MicroBatching
) -> TokenSignals:
    """`token_signals` without gradient, part by part, through all pipeline stages and known on all of them."""
    num_rows, num_tokens = len(sequences.prompt_lengths), int(sequences.completion_lengths.max())
    log_probs = torch.zeros(num_rows, num_tokens)
    entropy = torch.zeros(num_rows, num_tokens)
    mass = None if head_reduction is None else torch.zeros(num_rows, num_tokens)
    for rows in batching.split(sequences):
        part = select_rows(sequences, rows)
        signals = _without_gradient(model, part, head_reduction, packed=batching.packed_tokens is not None)
        width = signals[0].shape[1]
        log_probs[rows, :width], entropy[rows, :width] = signals[0], signals[1]
        if mass is not None:
            mass[rows, :width] = signals[2]
    return TokenSignals(log_probs=log_probs, entropy_nats=entropy, audio_mass=mass)


def _without_gradient(
    model: AudioLLM, sequences: TokenBatch, head_reduction: HeadReduction | None, *, packed: bool
) -> Float[Tensor, "signal batch time"]:
    """Log-probability, entropy and (if captured) mass, stacked, on every pipeline stage."""
    sequences = sequences.to(model.device)
    inputs = ModelInputs.of(sequences, packed=packed)
    output = forward_all_stages(
        model,
        inputs.tokens,
        inputs.audio,
        inputs.audio_row,
        packed_lengths=inputs.packed_lengths,
        audio_mass=head_reduction,
    )
    stacked = None
    if output is not None:
        signals = read_signals(model, output, inputs, sequences)
        found = (signals.log_probs, signals.entropy_nats, signals.audio_mass)
        stacked = torch.stack([signal for signal in found if signal is not None])
    shape = (2 if head_reduction is None else 3, len(sequences.prompt_lengths), int(sequences.completion_lengths.max()))
    return from_last_stage(stacked, shape, torch.zeros(0, device=model.device)).cpu()
