"""How the audio changes the distribution of each completion token, beyond its entropy (`objective.signal`; ours)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nemo_mapo.config.objective import Signal
from nemo_mapo.data.sequences import Rows, by_completion, response_mask, rows_together, select_rows
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.pipeline import forward_all_stages, from_last_stage
from nemo_mapo.objective.divergence import divergence
from nemo_mapo.training.references import FrozenReference
from nemo_mapo.training.signals import FEWEST_ROWS, LOGIT_CHUNK_ELEMENTS, MicroBatching, ModelInputs
from nemo_mapo.types import TokenBatch


@torch.no_grad()
def audio_contrast(
    policy: AudioLLM,
    reference: FrozenReference,
    sequences: TokenBatch,
    log_probs: Float[Tensor, "batch time"],
    kind: Signal,
    batching: MicroBatching,
) -> Float[Tensor, "batch time"] | None:
    """The signal of every completion token, which takes the place of delta h in both masks; None for delta_entropy.

    log_ratio: log pi(y_t | x) - log pi_textref(y_t | x_text), the pointwise information that the audio gives about the
    sampled token. kl, jsd: divergence of pi(. | x) from pi_textref(. | x_text) over the full vocabulary. pi is the
    policy that sampled the completions, so the signal is computed once per rollout batch.

    Args:
        policy: pi; with several pipeline stages all of them run and all get the result.
        reference: pi_textref.
        sequences: the rows.
        log_probs: log pi of their completion tokens.
        kind: `objective.signal`.
        batching: how rows go through both models.
    """
    if kind == "delta_entropy":
        return None
    if kind == "log_ratio":
        ratio: Tensor = log_probs - reference.text_log_probs(sequences)
        return ratio.masked_fill(~response_mask(sequences.completion_lengths, ratio.shape[1]), 0.0)

    def of_part(rows: Rows) -> Tensor:
        part = select_rows(sequences, rows).to(policy.device)
        return _divergences(policy, reference, part, kind, batching).cpu()

    return rows_together(((rows, of_part(rows)) for rows in batching.split(sequences)), len(log_probs))


def _divergences(
    policy: AudioLLM, reference: FrozenReference, part: TokenBatch, kind: Signal, batching: MicroBatching
) -> Float[Tensor, "batch time"]:
    assert kind == "kl" or kind == "jsd"
    heard = _completion_logits(partial(forward_all_stages, policy), part, batching)
    with reference.start_policy() as model:
        unheard = _completion_logits(partial(forward_all_stages, model), reference.text_rows(part), batching)
    values = None
    if heard is not None and unheard is not None:
        chunk = max(FEWEST_ROWS, LOGIT_CHUNK_ELEMENTS[heard.device.type] // heard.shape[-1])
        found = divergence(heard, unheard, kind=kind, chunk_size=chunk, process_group=policy.tensor_group)
        values = by_completion(found[0], part.completion_lengths)
    shape = (len(part.prompt_lengths), int(part.completion_lengths.max()))
    return from_last_stage(values, shape, torch.zeros(0, device=policy.device))


def _completion_logits(
    model: Callable[..., Any], part: TokenBatch, batching: MicroBatching
) -> Float[Tensor, "1 read vocab"] | None:
    """Logits that predict the completion tokens, completion after completion; None on all stages but the last."""
    inputs = batching.lay_out(part)
    output = inputs.call(model, None)
    if output is None or inputs.read_at is not None:
        return None if output is None else output.logits
    logits: Tensor = output.logits
    return logits.flatten(0, 1)[_predicting(inputs, part)][None]


def _predicting(inputs: ModelInputs, part: TokenBatch) -> Tensor:
    """Places of the predicting positions in the flattened rows."""
    written = response_mask(part.completion_lengths, int(part.completion_lengths.max()))
    starts = torch.arange(len(written), device=written.device) * inputs.tokens.shape[1]
    if inputs.packed_lengths is not None:
        starts = inputs.packed_lengths.cumsum(0) - inputs.packed_lengths
    first = starts + part.prompt_lengths - 1
    return (first[:, None] + torch.arange(written.shape[1], device=written.device))[written]
