"""Where in the audio completions attend: attention weights of the target layers, by head and frame."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemo_mapo.attention.core import SDPACoreAttention
from nemo_mapo.data.sequences import response_mask, row_slices, rows_together, select_rows
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.types import TokenBatch


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Attention to the audio during completions; layers are the target layers, in order."""

    mass: Float[Tensor, "batch layer head time"]
    """Attention to all audio keys at the position that predicts each completion token; 0 past the completion's end."""
    frames: Float[Tensor, "batch frame"]
    """Attention to each audio token, mean over completion tokens, heads and layers; 0 past the clip's end."""
    num_frames: Int[Tensor, " batch"]


@torch.no_grad()
def listen(policy: AudioLLM, sequences: TokenBatch, *, rows_at_a_time: int) -> Listening:
    """Run the rows once more with explicit attention weights for completion tokens.

    Memory is rows x heads x completion x row length for one layer at a time: for analyses, not for training.

    Raises:
        ValueError: the model is sharded over ranks, or its attention is not torch's.
    """
    _refuse_unsupported(policy)
    num_rows = len(sequences.prompt_lengths)
    parts = [
        (rows, _listen_to(policy, select_rows(sequences, rows).to(policy.device)))
        for rows in row_slices(num_rows, rows_at_a_time)
    ]
    mass = rows_together(((rows, part.mass.movedim(0, 2)) for rows, part in parts), num_rows)
    return Listening(
        mass=mass.movedim(2, 0),
        frames=rows_together(((rows, part.frames) for rows, part in parts), num_rows),
        num_frames=torch.cat([part.num_frames for _, part in parts]),
    )


def _listen_to(policy: AudioLLM, sequences: TokenBatch) -> Listening:
    placeholders = sequences.tokens == policy.audio_token_id
    # A policy may sample the placeholder; only placeholders in the prompt are audio.
    placeholders &= torch.arange(placeholders.shape[1], device=policy.device) < sequences.prompt_lengths[:, None]
    num_tokens = int(sequences.completion_lengths.max())
    positions = sequences.prompt_lengths[:, None] - 1 + torch.arange(num_tokens, device=policy.device)
    positions = positions.clamp(max=sequences.tokens.shape[1] - 1)
    written = response_mask(sequences.completion_lengths, num_tokens)
    masses, keys = [], []
    with _queries_and_keys(policy) as tapped:
        policy(sequences.tokens, sequences.audio, sequences.audio_row)
    for query, key, scale in tapped:
        weights = attention_rows(query, key, positions, softmax_scale=scale)
        weights = weights * (placeholders[:, None, None] & written[:, None, :, None])
        masses.append(weights.sum(-1))
        keys.append(weights.mean(1).sum(1) / sequences.completion_lengths[:, None])
    by_key = torch.stack(keys).mean(0)
    counts = placeholders.sum(1)
    frames = torch.zeros(len(counts), int(counts.max()), device=policy.device)
    frames[torch.arange(frames.shape[1], device=policy.device) < counts[:, None]] = by_key[placeholders]
    return Listening(mass=torch.stack(masses, dim=1).cpu(), frames=frames.cpu(), num_frames=counts.cpu())


def attention_rows(
    query: Float[Tensor, "batch time heads dim"],
    key: Float[Tensor, "batch time kv_heads dim"],
    positions: Int[Tensor, "batch chosen"],
    *,
    softmax_scale: float | None = None,
) -> Float[Tensor, "batch heads chosen time"]:
    """Causal attention weights of the queries at `positions` of right-padded rows."""
    heads, dim = query.shape[2:]
    chosen = query.gather(1, positions[:, :, None, None].expand(-1, -1, heads, dim)).float()
    keys = key.float().repeat_interleave(heads // key.shape[2], dim=2)
    logits = torch.einsum("bqhd,bkhd->bhqk", chosen, keys) * (dim**-0.5 if softmax_scale is None else softmax_scale)
    later = torch.arange(key.shape[1], device=key.device) > positions[:, None, :, None]
    return logits.masked_fill(later, -torch.inf).softmax(-1)


@contextmanager
def _queries_and_keys(policy: AudioLLM) -> Iterator[list[tuple[Tensor, Tensor, float | None]]]:
    """While active, collect the inputs of every target layer's core attention, batch first."""
    tapped: list[tuple[Tensor, Tensor, float | None]] = []

    def tap(module: SDPACoreAttention, arguments: tuple[Any, ...]) -> None:
        query, key = (tensor.transpose(0, 1) for tensor in arguments[:2])
        tapped.append((query, key, module.softmax_scale))

    cores = [core for core in _core_attentions(policy) if core.layer in policy.session.target_layers]
    handles = [core.register_forward_pre_hook(tap) for core in cores]
    try:
        yield tapped
    finally:
        for handle in handles:
            handle.remove()


def _core_attentions(policy: AudioLLM) -> list[SDPACoreAttention]:
    return [module for module in policy.modules() if isinstance(module, SDPACoreAttention)]


def _refuse_unsupported(policy: AudioLLM) -> None:
    config = policy.config
    if config.tensor_model_parallel_size > 1 or config.pipeline_model_parallel_size > 1:
        raise ValueError(
            f"the model is sharded into tensor_model_parallel_size={config.tensor_model_parallel_size} x "
            f"pipeline_model_parallel_size={config.pipeline_model_parallel_size}: attention weights are read in one "
            "process; build it with 1 and 1, a checkpoint of any layout can be loaded"
        )
    if not _core_attentions(policy):
        raise ValueError("the analysis reads the weights of torch's attention: set model.attention_backend=sdpa")
