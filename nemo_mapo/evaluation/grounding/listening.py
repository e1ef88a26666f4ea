"""Where in the audio completions attend: attention weights of the target layers, by head and frame."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemo_mapo.attention.core import SDPACoreAttention
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import PADDED_ROWS, in_parts
from nemo_mapo.rows import Row


@dataclass(frozen=True, kw_only=True, eq=False)
class Listening:
    """Attention to the audio during a completion; layers are the target layers, in order."""

    mass: Float[Tensor, "layer head time"]
    """Attention to all audio keys at the position that predicts each completion token."""
    frames: Float[Tensor, " frame"]
    """Attention to each audio token, mean over completion tokens, heads and layers."""


@torch.no_grad()
def listen(policy: AudioLLM, rows: Sequence[Row], *, rows_at_a_time: int) -> list[Listening]:
    """Run the rows once more with explicit attention weights for completion tokens.

    Memory is heads x completion x row length for one layer and row at a time: for analyses, not for training.

    Raises:
        ValueError: the model is sharded over ranks, or its attention is not torch's.
    """
    _refuse_unsupported(policy)
    return [heard for part in in_parts(rows, rows_at_a_time) for heard in _listen_to(policy, part)]


def _listen_to(policy: AudioLLM, rows: Sequence[Row]) -> list[Listening]:
    inputs = PADDED_ROWS.lay_out(rows, policy)
    with _queries_and_keys(policy) as tapped:
        inputs.call(policy, None)
    places = torch.arange(inputs.tokens.shape[1], device=policy.device).expand_as(inputs.tokens)
    found = []
    for number, (row, predicting) in enumerate(zip(rows, inputs.by_row(places), strict=True)):
        # A policy may sample the placeholder; only placeholders in the prompt are audio.
        audio = (row.prompt.token_ids == policy.audio_token_id).nonzero().flatten().to(policy.device)
        by_layer = [
            attention_rows(query[number, None], key[number, None], predicting[None], softmax_scale=scale)[0, ..., audio]
            for query, key, scale in tapped
        ]
        weights = torch.stack(by_layer).cpu()
        found.append(Listening(mass=weights.sum(-1), frames=weights.mean((0, 1, 2))))
    return found


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
