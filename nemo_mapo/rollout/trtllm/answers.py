"""Converts TensorRT-LLM's output to completions; invalid output never becomes a sample."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from nemo_mapo.rollout.completions import BadAnswer, Drawn, check_completions


def unpack(
    output: Mapping[str, Tensor],
    prompts: Sequence[Int[Tensor, "_"]],
    *,
    vocab_size: int,
    stop_ids: Sequence[int],
    max_new_tokens: int,
) -> list[Drawn]:
    """Extract the completions after the prompts in the rows.

    Args:
        output: see `TrtllmEngine.generate`.
        prompts: ids as the engine got them.
        vocab_size: of the tokens that can be drawn.
        stop_ids: tokens that end a completion.
        max_new_tokens: the length limit.

    Returns:
        Completions with the log-probs as the engine states them (`TrtllmEngine.generate`).

    Raises:
        BadAnswer: the answer is not one whole completion for each prompt.
    """
    for name, axes in (("output_ids", 3), ("sequence_lengths", 2), ("log_probs", 3)):
        if name not in output or output[name].ndim != axes or output[name].shape[:2] != (len(prompts), 1):
            given = list(output[name].shape) if name in output else "missing"
            raise BadAnswer(f"TensorRT-LLM's {name} is {given}, not of {axes} axes for {len(prompts)} prompts x 1 beam")
    ids, reported = output["output_ids"][:, 0].cpu().long(), output["log_probs"][:, 0].cpu().float()
    ends = output["sequence_lengths"][:, 0].cpu().tolist()
    found: list[Drawn] = []
    for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        start = len(prompt)
        if not torch.equal(ids[row, :start], prompt.long()):
            raise BadAnswer(f"TensorRT-LLM's row {row} begins with a prompt other than the one that was asked")
        drawn = ids[row, start : max(start, end)].tolist()
        if len(drawn) != end - start:
            raise BadAnswer(f"TensorRT-LLM's row {row} has {len(drawn)} tokens, its length says {end - start}")
        if any(token in stop_ids for token in drawn[:-1]):
            raise BadAnswer(f"TensorRT-LLM's row {row} goes on after a stop token")
        found.append(
            Drawn(
                token_ids=tuple(drawn),
                sampling_log_probs=tuple(reported[row, start:end].tolist()),
                stopped=any(token in stop_ids for token in drawn),
            )
        )
    check_completions(found, count=len(prompts), max_tokens=max_new_tokens, vocab_size=vocab_size)
    return found
