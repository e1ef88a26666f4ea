"""What TensorRT-LLM answered, as completions; nothing that is not one becomes a sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class EngineCompletions:
    """Completions of one engine batch, on the CPU."""

    tokens: Int[Tensor, "batch time"]
    """int64, stop token included, right-padded with the pad id."""
    lengths: Int[Tensor, " batch"]
    stopped: Bool[Tensor, " batch"]
    log_probs: Float[Tensor, "batch time"]
    """As the engine says them (`TrtllmEngine.generate`), nats; 0 on padding."""


def unpack(
    output: Mapping[str, Tensor],
    prompts: Sequence[Int[Tensor, "_"]],
    *,
    vocab_size: int,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    pad_id: int,
) -> EngineCompletions:
    """Take the completions out of the rows behind their prompts.

    Args:
        output: see `TrtllmEngine.generate`.
        prompts: ids as the engine got them.
        vocab_size: of the tokens that can be drawn.
        stop_ids: tokens that end a completion.
        max_new_tokens: the length limit.
        pad_id: fills the result.

    Raises:
        RuntimeError: the answer is not one whole completion for each prompt; names the row.
    """
    for name, axes in (("output_ids", 3), ("sequence_lengths", 2), ("log_probs", 3)):
        if name not in output or output[name].ndim != axes or output[name].shape[:2] != (len(prompts), 1):
            found = list(output[name].shape) if name in output else "missing"
            raise RuntimeError(
                f"TensorRT-LLM's {name} is {found}, not of {axes} axes for {len(prompts)} prompts x 1 beam"
            )
    ids, reported = output["output_ids"][:, 0].cpu().long(), output["log_probs"][:, 0].cpu().float()
    ends = output["sequence_lengths"][:, 0].cpu().tolist()
    tokens = torch.full((len(prompts), max_new_tokens), pad_id)
    log_probs = torch.zeros(len(prompts), max_new_tokens)
    lengths = torch.zeros(len(prompts), dtype=torch.int64)
    stopped = torch.zeros(len(prompts), dtype=torch.bool)
    for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        start = len(prompt)
        completion = ids[row, start:end]
        if problem := _problem(ids[row, :start], prompt, completion, end, vocab_size, set(stop_ids), max_new_tokens):
            raise RuntimeError(f"TensorRT-LLM's row {row} is no completion: {problem}")
        lengths[row] = len(completion)
        stopped[row] = int(completion[-1]) in stop_ids
        tokens[row, : len(completion)] = completion
        log_probs[row, : len(completion)] = reported[row, start:end]
    if not log_probs.isfinite().all():
        row = int((~log_probs.isfinite()).nonzero()[0, 0])
        raise RuntimeError(f"TensorRT-LLM's row {row} has a log-prob that is not finite")
    longest = int(lengths.max())
    return EngineCompletions(
        tokens=tokens[:, :longest], lengths=lengths, stopped=stopped, log_probs=log_probs[:, :longest]
    )


def _problem(
    echoed: Int[Tensor, "_"],
    prompt: Int[Tensor, "_"],
    completion: Int[Tensor, "_"],
    end: int,
    vocab_size: int,
    stops: set[int],
    max_new_tokens: int,
) -> str | None:
    """What keeps a row from being a completion; None if nothing does."""
    if len(echoed) != len(prompt) or not torch.equal(echoed, prompt.long()):
        return "it begins with another prompt than was asked"
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
