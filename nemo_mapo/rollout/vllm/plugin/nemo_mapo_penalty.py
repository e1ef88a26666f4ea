"""Our repetition penalty inside vLLM (`--logits-processors nemo_mapo_penalty:CompletionPenalty`).

vLLM's own penalty also counts the tokens of the prompt, which ours does not. For a prompt of embeddings, which has no
tokens, release 0.32 counts stale tokens of an earlier request. vLLM imports this file in its own environment; it
imports nothing of ours.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

ARGUMENT = "completion_penalty"
"""Its name in a request's `vllm_xargs` or `extra_args`."""


class CompletionPenalty(AdapterLogitsProcessor):  # type: ignore[misc]
    """Divides positive and multiplies negative logits of the tokens already in the completion, once each."""

    def is_argmax_invariant(self) -> bool:
        """The penalty can change which token is most likely."""
        return False

    def new_req_logits_processor(self, params: Any) -> "Callable[..., torch.Tensor] | None":
        """The penalty of a request; None for one without."""
        penalty = float((params.extra_args or {}).get(ARGUMENT, 1.0))
        return None if penalty == 1.0 else partial(_penalize, penalty)


def _penalize(penalty: float, output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    written = torch.tensor(sorted(set(output_ids)), dtype=torch.int64, device=logits.device)
    scores = logits[written]
    logits[written] = torch.where(scores > 0, scores / penalty, scores * penalty)
    return logits
