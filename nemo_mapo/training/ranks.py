"""What the ranks of a run tell each other outside the model: shares of the work, and figures about it."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_mapo.types import Metric

Item = TypeVar("Item")


def is_main_rank() -> bool:
    """Whether this rank writes the run directory and talks to the user."""
    return dist.get_rank() == 0


def data_parallel_prompts(num_prompts: int, optimizer_steps: int) -> list[int]:
    """Numbers of the prompts of a rollout batch that this data-parallel rank works on.

    Optimiser step k trains on the k-th of `optimizer_steps` equal runs of prompts, and each run is shared out over the
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
    """Every so many-th of the items, so that the data-parallel ranks have them all between them."""
    return items[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]


def gather_over_data_parallel(value: Item) -> list[Item]:
    """What every data-parallel rank has, by rank."""
    return _all_gather(value)


def gather_over_all(value: Item) -> list[Item]:
    """What every rank has, by rank."""
    gathered: list[Any] = [value] * dist.get_world_size()
    if len(gathered) > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def shares_experts() -> bool:
    """Whether data-parallel ranks hold different experts, so that each needs the others in every layer."""
    return bool(parallel_state.get_expert_model_parallel_world_size() > 1)


def sum_over_data_parallel(value: int) -> int:
    """Sum of a count over the data-parallel ranks."""
    if parallel_state.get_data_parallel_world_size() == 1:
        return value
    total = torch.tensor(value, device=torch.cuda.current_device())
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return int(total)


def gather_metrics(parts: list[dict[str, Metric]]) -> list[dict[str, Metric]]:
    """The parts of all data-parallel ranks, on all ranks; the last pipeline stage has them at first."""
    parts = _broadcast_from_last_stage(parts)
    return [part for rank_parts in _all_gather(parts) for part in rank_parts]


def _broadcast_from_last_stage(value: Any) -> Any:
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(
        held,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return held[0]


def _all_gather(value: Any) -> list[Any]:
    size = parallel_state.get_data_parallel_world_size()
    if size == 1:
        return [value]
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, value, group=parallel_state.get_data_parallel_group())
    return gathered
