"""The policy's weights for a rollout engine in another process: whole, under the unsharded model's names.

Megatron's state for distributed checkpoints says where each part of a tensor lies; there are no rules per layer.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from torch import Tensor

from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.ranks import gather

Entry: TypeAlias = ShardedTensor | ShardedTensorFactory
"""The entry of a tensor in a sharded state."""
_NUMBER = re.compile(r"(?<=\.layers\.)\d+|(?<=\.local_experts\.)\d+")
"""Numbers in a name that count from the first layer of a stage and from the first expert of a rank."""
_RECEIVER = 0


class _Place(NamedTuple):
    """Where a part belongs in its tensor; exchanged between all ranks."""

    name: str
    """Name of the whole tensor in the unsharded model."""
    dtype: torch.dtype
    whole: tuple[int, ...]
    """Shape of the whole tensor, including rows that pad a vocabulary."""
    rows: int | None
    """How many of its rows the unsharded model has; None is all."""
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Part:
    """What this rank holds of a tensor, and sends if it is not the receiver."""

    place: _Place
    data: Tensor


def policy_tensors(policy: AudioLLM) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the unsharded policy's state, detached, one after the other.

    An unsharded model yields its own tensors on every rank; nothing is copied or sent. Otherwise this is a collective:
    all ranks must exhaust the iterator, with unchanged weights. Only rank 0 gets the tensors; on the others the
    iterator is empty, and exhausting it sends their parts. Besides its share of the model, rank 0 holds one whole
    tensor at a time (if the caller drops it before asking for the next) and, if a tensor is sharded across its rows,
    one part of it; the others hold nothing extra.
    """
    if not _is_cut(policy):
        for name, value in policy.state_dict().items():
            # Megatron's modules keep extra states beside the tensors: None, or bytes of Transformer Engine.
            if isinstance(value, Tensor):
                yield name, value
        return
    own: dict[str, list[_Part]] = {}
    for part in _main_parts(policy):
        own.setdefault(part.place.name, []).append(part)
    is_receiver = dist.get_rank() == _RECEIVER
    for name, places in _places_by_name([part.place for parts in own.values() for part in parts]).items():
        parts = own.get(name, [])
        if is_receiver:
            yield name, _whole(places, parts, policy.device)
        else:
            for part in parts:
                dist.send(part.data.contiguous(), dst=_RECEIVER)


def sharded_tensors(model: AudioLLM) -> dict[str, Entry]:
    """The tensors of a model's sharded state by their names on this rank, without the extra states of linears."""
    state = model.sharded_state_dict()
    return {name: entry for name, entry in state.items() if isinstance(entry, Entry)}


def shards_of(entry: Entry) -> list[ShardedTensor]:
    """The tensor itself, or the parts that Megatron splits it into (gate and up of a SwiGLU); views of its data."""
    if isinstance(entry, ShardedTensorFactory):
        shards: list[ShardedTensor] = entry.build()
        return shards
    return [entry]


def _is_cut(policy: AudioLLM) -> bool:
    config = policy.config
    sizes = (
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.expert_model_parallel_size,
    )
    return any(size > 1 for size in sizes)


def _main_parts(policy: AudioLLM) -> Iterator[_Part]:
    """The parts that this rank contributes; a part that several ranks replicate is contributed by one of them."""
    for name, entry in sharded_tensors(policy).items():
        for shard in shards_of(replace(entry, data=entry.data.detach())):
            if is_main_replica(shard.replica_id):
                yield _Part(_place(name, shard, policy.vocab_size), shard.data)


def _place(name: str, shard: ShardedTensor, vocab_size: int) -> _Place:
    axes = shard.prepend_axis_num
    # Megatron stacks layers and experts along axes before the tensor's own; the offsets in them are their numbers.
    between = _NUMBER.split(name) if axes else [name]
    assert len(between) == axes + 1, f"{name}: {len(between) - 1} numbers of layers and experts, {axes} stacked axes"
    numbers = [*map(str, shard.global_offset[:axes]), ""]
    return _Place(
        name="".join(text + number for text, number in zip(between, numbers, strict=True)),
        dtype=shard.dtype,
        whole=tuple(shard.global_shape[axes:]),
        # Megatron's mark of tensors whose rows are the vocabulary.
        rows=vocab_size if shard.allow_shape_mismatch else None,
        offset=tuple(shard.global_offset[axes:]),
        shape=tuple(shard.local_shape),
    )


def _places_by_name(own: list[_Place]) -> dict[str, list[tuple[int, _Place]]]:
    """Rank and place of every part, by tensor, the same on all ranks; the parts cover each tensor exactly."""
    by_name: dict[str, list[tuple[int, _Place]]] = {}
    for rank, places in enumerate(gather(own)):
        for place in places:
            by_name.setdefault(place.name, []).append((rank, place))
    for name, parts in by_name.items():
        whole = torch.Size(parts[0][1].whole).numel()
        held = sum(torch.Size(place.shape).numel() for _, place in parts)
        assert held == whole, f"ranks hold {held} of {whole} elements of {name}"
    return by_name


def _whole(places: list[tuple[int, _Place]], own: Sequence[_Part], device: torch.device) -> Tensor:
    """Assemble a tensor on the receiver, from its own parts and those that the others send, in their order."""
    first = places[0][1]
    if len(own) == len(places) == 1:
        return _without_padding(own[0].data, first.rows)
    whole = torch.empty(first.whole, dtype=first.dtype, device=device)
    own_data = iter(part.data for part in own)
    for rank, place in places:
        target = whole[tuple(slice(start, start + size) for start, size in zip(place.offset, place.shape, strict=True))]
        if rank == _RECEIVER:
            target.copy_(next(own_data))
        elif target.is_contiguous():
            dist.recv(target, src=rank)
        else:
            part = torch.empty(place.shape, dtype=place.dtype, device=device)
            dist.recv(part, src=rank)
            target.copy_(part)
    return _without_padding(whole, first.rows)


def _without_padding(whole: Tensor, rows: int | None) -> Tensor:
    return whole if rows is None else whole[:rows]
