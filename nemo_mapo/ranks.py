"""The ranks of a run: the device of this one, its share of the work, and communication between them.

All ranks of a group call a collective together; a single process, with or without process groups, gets its own value.

    sum(gather_over_data_parallel(len(rows)))  # rows of the whole batch
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

Item = TypeVar("Item")


def device() -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks in the group (None: in the run)."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def any_rank(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Whether the flag is set on at least one rank of the group (None: of the run); the same answer on all of them."""
    if world_size(group) == 1:
        return flag
    raised = torch.tensor(float(flag), device=device())
    dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=group)
    return bool(raised)


def any_expert_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank that shards the same experts: none of them can run a layer alone."""
    return any_rank(flag, parallel_state.get_expert_model_parallel_group())


def gather(value: Item, group: dist.ProcessGroup | None = None) -> list[Item]:
    """The value of every rank of the group (None: of the run), in rank order."""
    gathered: list[Any] = [value] * world_size(group)
    if len(gathered) > 1:
        dist.all_gather_object(gathered, value, group=group)
    return gathered


def gather_over_data_parallel(value: Item) -> list[Item]:
    """The value of every data-parallel rank, in rank order."""
    return gather(value, parallel_state.get_data_parallel_group())


def gather_metrics(parts: list[Item]) -> list[Item]:
    """The parts of all data-parallel ranks, on all ranks; only those of the last pipeline stage are read."""
    last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
    whole: list[Item] = _broadcast(parts, last_stage, parallel_state.get_pipeline_model_parallel_group())
    return [part for of_rank in gather_over_data_parallel(whole) for part in of_rank]


def from_main_rank(value: Item | None) -> Item:
    """Rank 0's value on all ranks; what the others pass is ignored."""
    received: Item = _broadcast(value, 0)
    return received


def asks_for_its_replica() -> bool:
    """Whether this rank sends the requests of its model replica; that rank is on the first pipeline stage."""
    return world_size() == 1 or dist.get_rank() == parallel_state.get_model_parallel_src_rank()


def from_asking_rank(value: Item) -> Item:
    """The value of the rank that sends this model replica's requests, on all ranks of the replica."""
    if world_size() == 1:
        return value
    source = parallel_state.get_model_parallel_src_rank()
    received: Item = _broadcast(value, source, parallel_state.get_model_parallel_group())
    return received


def _broadcast(value: Any, source: int, group: dist.ProcessGroup | None = None) -> Any:
    if world_size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def data_parallel_prompts(num_prompts: int, optimizer_steps: int) -> list[int]:
    """Indices of the prompts of a rollout batch that this data-parallel rank works on.

    Optimiser step k trains on the k-th of `optimizer_steps` equal runs of prompts, and each run is divided among the
    ranks: whatever their number, a step sees the same completions, and a group stays on one rank.
    """
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    if size == 1:
        return list(range(num_prompts))
    per_step = num_prompts // optimizer_steps
    assert per_step * optimizer_steps == num_prompts and per_step % size == 0, "the config makes them divisible"
    share = per_step // size
    first = [step * per_step + rank * share for step in range(optimizer_steps)]
    return [prompt for start in first for prompt in range(start, start + share)]


def data_parallel_share(items: tuple[Item, ...]) -> tuple[Item, ...]:
    """This data-parallel rank's share of the items, dealt out in turn."""
    return items[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]


def shares_experts() -> bool:
    """Whether data-parallel ranks hold different experts, so that each needs the others in every layer."""
    return bool(parallel_state.get_expert_model_parallel_world_size() > 1)
