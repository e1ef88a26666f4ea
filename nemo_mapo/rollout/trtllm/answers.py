"""Converts TensorRT-LLM's output to completions; invalid output never becomes a sample."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from nemo_mapo.rollout.completions import Drawn


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
        RuntimeError: the answer is not one whole completion for each prompt; names the row.
    """
    for name, axes in (("output_ids", 3), ("sequence_lengths", 2), ("log_probs", 3)):
        if name not in output or output[name].ndim != axes or output[name].shape[:2] != (len(prompts), 1):
            given = list(output[name].shape) if name in output else "missing"
            raise RuntimeError(
                f"TensorRT-LLM's {name} is {given}, not of {axes} axes for {len(prompts)} prompts x 1 beam"
            )
    ids, reported = output["output_ids"][:, 0].cpu().long(), output["log_probs"][:, 0].cpu().float()
    ends = output["sequence_lengths"][:, 0].cpu().tolist()
    found: list[Drawn] = []
    for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        start = len(prompt)
        completion, log_probs = ids[row, start:end], reported[row, start:end]
        if problem := _problem(ids[row, :start], prompt, completion, end, vocab_size, set(stop_ids), max_new_tokens):
            raise RuntimeError(f"TensorRT-LLM's row {row} is no completion: {problem}")
        if not log_probs.isfinite().all():
            raise RuntimeError(f"TensorRT-LLM's row {row} has a log-prob that is not finite")
        found.append(
            Drawn(
                token_ids=tuple(completion.tolist()),
                sampling_log_probs=tuple(log_probs.tolist()),
                stopped=int(completion[-1]) in stop_ids,
            )
        )
    return found


def _problem(
    echoed: Int[Tensor, "_"],
    prompt: Int[Tensor, "_"],
    completion: Int[Tensor, "_"],
    end: int,
    vocab_size: int,
    stops: set[int],
    max_new_tokens: int,
) -> str | None:
    """Why a row is not a valid completion; None if it is."""
    if len(echoed) != len(prompt) or not torch.equal(echoed, prompt.long()):
        return "it begins with a prompt other than the one that was asked"
    drawn = completion.tolist()
    if len(drawn) != end - len(prompt) or not 1 <= len(drawn) <= max_new_tokens:
        return f"{len(drawn)} tokens, its length says {end - len(prompt)} of at most {max_new_tokens}"
    if outside := [token for token in drawn if not 0 <= token < vocab_size]:
        return f"id {outside[0]} is not one of the {vocab_size} of the vocabulary"
    if any(token in stops for token in drawn[:-1]):
        return "it goes on after a stop token"
    if drawn[-1] not in stops and len(drawn) < max_new_tokens:
        return f"it ends after {len(drawn)} tokens without a stop token, before the limit of {max_new_tokens}"
    return None
