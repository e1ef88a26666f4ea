"""Completions from an engine outside this process: checked before they become samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from nemo_mapo.data.prompts import whole_text
from nemo_mapo.rows import Completion, Prompt


class BadAnswer(RuntimeError):
    """An engine returned an invalid response."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One completion as returned by the engine, not checked yet."""

    token_ids: tuple[int, ...]
    sampling_log_probs: tuple[float, ...]
    """Under the distribution sampled from, nats."""
    stopped: bool
    """Whether a stop token ended it; otherwise the length limit did."""


def check_completions(completions: Sequence[Drawn], *, count: int, max_tokens: int, vocab_size: int) -> None:
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


def completed(drawn: Drawn, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, weight_version: int) -> Completion:
    """Convert the completions of a prompt to the types of the rest of the package."""
    return Completion(
        token_ids=torch.tensor(drawn.token_ids, dtype=torch.int64),
        sampling_log_probs=torch.tensor(drawn.sampling_log_probs, dtype=torch.float32),
        log_probs=None,
        stopped=drawn.stopped,
        text=whole_text(prompt, drawn.token_ids[: len(drawn.token_ids) - drawn.stopped], tokenizer),
        weight_version=weight_version,
    )
