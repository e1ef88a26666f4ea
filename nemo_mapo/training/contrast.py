"""How the audio changes the distribution of each completion token, beyond its entropy (`objective.signal`; ours)."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from nemo_mapo.config.objective import Signal
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import MicroBatching, in_row_order, known_to_all_stages
from nemo_mapo.models.pipeline import forward_all_stages
from nemo_mapo.objective.divergence import divergence
from nemo_mapo.rows import Row, TokenSignals
from nemo_mapo.training.references import FrozenReference
from nemo_mapo.training.signals import FEWEST_ROWS, LOGIT_CHUNK_ELEMENTS


@torch.no_grad()
def audio_contrast(
    policy: AudioLLM,
    reference: FrozenReference,
    rows: Sequence[Row],
    signals: Mapping[int, TokenSignals],
    kind: Signal,
    batching: MicroBatching,
) -> list[Float[Tensor, "_"]] | None:
    """The signal of every completion token, which takes the place of delta h in both masks; None for delta_entropy.

    log_ratio: log pi(y_t | x) - log pi_textref(y_t | x_text), the pointwise information that the audio gives about the
    sampled token. kl, jsd: divergence of pi(. | x) from pi_textref(. | x_text) over the full vocabulary. pi is the
    policy that sampled the completions, so the signal is computed once per rollout batch.

    Args:
        policy: pi; with several pipeline stages all of them run and all get the result.
        reference: pi_textref.
        rows: prompts and completions.
        signals: what pi says of the rows, by number; read for log_ratio only.
        kind: `objective.signal`.
        batching: how rows go through both models.
    """
    if kind == "delta_entropy":
        return None
    if kind == "log_ratio":
        unheard = reference.text_log_probs(rows)
        return [signals[number].log_probs - log_probs for number, log_probs in enumerate(unheard)]
    parts = batching.split(rows)
    read = (_divergences(policy, reference, [rows[number] for number in part], kind, batching) for part in parts)
    return in_row_order(parts, read)


def _divergences(
    policy: AudioLLM, reference: FrozenReference, rows: Sequence[Row], kind: Signal, batching: MicroBatching
) -> list[Float[Tensor, "_"]]:
    assert kind == "kl" or kind == "jsd"
    heard = _logits(policy, rows, batching)
    with reference.start_policy() as model:
        unheard = _logits(model, reference.text_rows(rows), batching)
    found = None
    if heard is not None and unheard is not None:
        chunk = max(FEWEST_ROWS, LOGIT_CHUNK_ELEMENTS[heard[0].device.type] // heard[0].shape[-1])
        of_row = partial(divergence, kind=kind, chunk_size=chunk, process_group=policy.tensor_group)
        found = [of_row(one[None], other[None])[0] for one, other in zip(heard, unheard, strict=True)]
    return known_to_all_stages(found, rows, policy)


def _logits(model: AudioLLM, rows: Sequence[Row], batching: MicroBatching) -> list[Float[Tensor, "_ vocab"]] | None:
    """Logits that predict the completion tokens of each row; None on all stages but the last."""
    inputs = batching.lay_out(rows, model)
    output = inputs.call(partial(forward_all_stages, model), None)
    return None if output is None else inputs.by_row(output.logits)
