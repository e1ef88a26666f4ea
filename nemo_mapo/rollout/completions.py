"""Completions one by one, as an engine outside of this process gives them, and the batch that they become."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from nemo_mapo.data.prompts import whole_texts
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.types import PromptBatch, Rollouts


class BadAnswer(RuntimeError):
    """An engine answered with something else than was asked for."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One completion."""

    token_ids: tuple[int, ...]
    sampling_log_probs: tuple[float, ...]
    """Under the distribution sampled from, nats."""
    stopped: bool
    """Whether a stop token ended it; else the length limit did."""
    log_probs: tuple[float, ...] | None = None
    """Under the unmodified model, nats; None if the engine does not give them."""


def check_completions(completions: Sequence[Completion], *, count: int, max_tokens: int, vocab_size: int) -> None:
    """BadAnswer unless there are `count` whole completions: nothing else may become a sample."""
    if len(completions) != count:
        raise BadAnswer(f"{len(completions)} completions for {count} seeds")
    for completion in completions:
        length = len(completion.token_ids)
        given = completion.sampling_log_probs
        if length == 0:
            raise BadAnswer("a completion is empty")
        if length != len(given):
            raise BadAnswer(f"a completion of {length} tokens has {len(given)} log-probs")
        if not all(isinstance(token, int) and 0 <= token < vocab_size for token in completion.token_ids):
            raise BadAnswer(f"a token id is not one of the {vocab_size} of the tokenizer")
        if not all(math.isfinite(value) for value in given):
            raise BadAnswer("a log-prob is not finite")
        if length > max_tokens or (length < max_tokens and not completion.stopped):
            raise BadAnswer(f"a completion of {length} tokens ended at the length limit, which is {max_tokens}")


def as_rollouts(
    prompts: PromptBatch,
    completions: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    *,
    group_size: int,
    weight_version: int,
) -> Rollouts:
    """The batch of these completions, in their order, where the prompts lie."""
    device = prompts.tokens.device

    def padded(rows: Iterable[Sequence[int | float]], fill: int | float, dtype: torch.dtype) -> Tensor:
        tensors = [torch.tensor(row, dtype=dtype) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=fill).to(device)

    unmodified = [one.log_probs for one in completions if one.log_probs is not None]
    return Rollouts(
        prompts=prompts,
        group_size=group_size,
        completions=padded(
            (one.token_ids for one in completions), SpecialTokens.from_tokenizer(tokenizer).pad_id, torch.int64
        ),
        completion_lengths=torch.tensor([len(one.token_ids) for one in completions], device=device),
        finish_reasons=tuple("stop" if one.stopped else "length" for one in completions),
        texts=whole_texts(
            prompts, [one.token_ids[: len(one.token_ids) - one.stopped] for one in completions], tokenizer, group_size
        ),
        log_probs=padded(unmodified, 0.0, torch.float32) if len(unmodified) == len(completions) else None,
        sampling_log_probs=padded((one.sampling_log_probs for one in completions), 0.0, torch.float32),
        weight_version=weight_version,
    )
