"""What one forward pass says about every completion token: log-probability, entropy, audio mass."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nemo_mapo.attention.session import HeadReduction
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.objective.logprobs import log_probs_and_entropy
from nemo_mapo.training.sequences import at_predicting_positions, next_tokens, row_slices, select_rows
from nemo_mapo.types import TokenBatch

LOGIT_ROWS_PER_CHUNK = 4096
"""Positions whose logits are upcast together; bounds the extra memory at 4096 x vocabulary x 4 bytes."""


@dataclass(frozen=True, kw_only=True)
class TokenSignals:
    """Per completion token, read at the position that predicts it; 0 past the completion's end."""

    log_probs: Float[Tensor, "batch time"]
    entropy_nats: Float[Tensor, "batch time"]
    audio_mass: Float[Tensor, "batch time"] | None


def token_signals(model: AudioLLM, sequences: TokenBatch, *, head_reduction: HeadReduction | None) -> TokenSignals:
    """Run the model on prompt + completion rows; differentiable in log-probability and mass.

    `head_reduction` None captures no audio mass.
    """
    output = model(sequences.tokens, sequences.audio, sequences.audio_row, audio_mass=head_reduction)
    log_probs, entropy = log_probs_and_entropy(
        output.logits, next_tokens(sequences.tokens), chunk_size=LOGIT_ROWS_PER_CHUNK
    )
    mass = output.audio_mass
    return TokenSignals(
        log_probs=at_predicting_positions(log_probs, sequences),
        entropy_nats=at_predicting_positions(entropy, sequences),
        audio_mass=None if mass is None else at_predicting_positions(mass, sequences),
    )


@torch.no_grad()
def token_signals_in_parts(
    model: AudioLLM, sequences: TokenBatch, *, head_reduction: HeadReduction | None, rows_per_pass: int
) -> TokenSignals:
    """`token_signals` without gradient, `rows_per_pass` rows at a time."""
    num_rows, num_tokens = len(sequences.prompt_lengths), int(sequences.completion_lengths.max())
    log_probs = torch.zeros(num_rows, num_tokens)
    entropy = torch.zeros(num_rows, num_tokens)
    mass = None if head_reduction is None else torch.zeros(num_rows, num_tokens)
    for rows in row_slices(num_rows, rows_per_pass):
        part = token_signals(model, select_rows(sequences, rows), head_reduction=head_reduction)
        width = part.log_probs.shape[1]
        log_probs[rows, :width] = part.log_probs
        entropy[rows, :width] = part.entropy_nats
        if mass is not None and part.audio_mass is not None:
            mass[rows, :width] = part.audio_mass
    return TokenSignals(log_probs=log_probs, entropy_nats=entropy, audio_mass=mass)
