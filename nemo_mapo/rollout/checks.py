"""Checks shared by the engines in the trainer's process, and the tokens that none of them samples."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.rows import Prompt


def never_drawn(
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase,
    stops: AbstractSet[int],
    forbidden: AbstractSet[int] = frozenset(),
) -> list[int]:
    """Ids that are never sampled: forbidden ones, special tokens except `stops`, ids that the tokenizer lacks.

    Raises:
        ValueError: an id is not in the vocabulary, a stop token is forbidden, or nothing but stop tokens is left.
    """
    vocabulary = set(range(vocab_size))
    never = forbidden | set(range(len(tokenizer), vocab_size)) | set(tokenizer.all_special_ids) - stops
    if beyond := sorted((never | stops) - vocabulary):
        raise ValueError(f"token ids {beyond} are not in the model's vocabulary of {vocab_size} ids")
    if contradictory := sorted(never & stops):
        raise ValueError(f"token ids {contradictory} are stop tokens and cannot be forbidden")
    if not stops or never | stops == vocabulary:
        raise ValueError("there must be a stop token, and a token that is neither a stop token nor forbidden")
    return sorted(never)


def refuse_impossible(
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    group_size: int,
    seeds: Int[Tensor, " batch"],
    batch_size: int,
    model: AudioLLM,
) -> None:
    """ValueError if there are no prompts, a group or a row does not fit, or the seeds are not one int64 per row.

    Args:
        prompts: the request.
        sampling: its length limit.
        group_size: completions of each prompt.
        seeds: of the completions.
        batch_size: completions that the engine makes together, whole groups only.
        model: has the positions that a prompt and its completion must fit.
    """
    if len(prompts) == 0:
        raise ValueError("the batch has no prompts")
    if not 1 <= group_size <= batch_size:
        raise ValueError(
            f"group_size={group_size} must be between 1 and rollout.batch_size={batch_size}: "
            "a group is generated together"
        )
    if seeds.dtype != torch.int64 or seeds.shape != (len(prompts) * group_size,):
        raise ValueError(
            f"seeds must be int64 of shape ({len(prompts)} prompts x group_size={group_size},), "
            f"got {seeds.dtype} of shape {tuple(seeds.shape)}"
        )
    worst = max(prompts, key=len)
    refuse_long(f"prompt {worst.id!r}", len(worst), sampling, max_positions=model.max_positions)


def refuse_long(prompt: str, tokens: int, sampling: SamplingConfig, *, max_positions: int) -> None:
    """ValueError, naming the options, if a prompt and the longest completion exceed the model's positions.

    Args:
        prompt: its name in the message.
        tokens: number of tokens of the prompt, including audio.
        sampling: its length limit.
        max_positions: of the model.
    """
    if tokens + sampling.max_new_tokens > max_positions:
        raise ValueError(
            f"{prompt} has {tokens} tokens (audio included), which leaves no room for rollout.sampling.max_new_tokens="
            f"{sampling.max_new_tokens} within model.decoder.max_position_embeddings={max_positions}: shorten the "
            "clips (max_duration of the data, data.max_clip_seconds of an evaluation), lower max_new_tokens, or raise "
            "the positions"
        )
