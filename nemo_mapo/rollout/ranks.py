"""Which rank talks to servers, and what the others learn from it; one process is its own first rank."""

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from nemo_mapo.models.pipeline import any_rank


def several_ranks() -> bool:
    """Whether there are other processes."""
    return dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    """Whether this is rank 0."""
    return not dist.is_initialized() or dist.get_rank() == 0


def any_rank_of_run(flag: bool) -> bool:
    """Whether the flag is up on at least one rank; the same answer on all of them."""
    return any_rank(flag) if several_ranks() else flag


def from_first_rank(value: Any) -> Any:
    """What the first rank has, on all of them."""
    if not several_ranks():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def asks_for_its_replica() -> bool:
    """Whether this rank is the one of its model replica that sends requests; it is on the first pipeline stage."""
    return not several_ranks() or dist.get_rank() == parallel_state.get_model_parallel_src_rank()


def from_asking_rank(value: Any) -> Any:
    """What the asking rank of this model replica has, on all ranks of the replica."""
    if not several_ranks():
        return value
    box = [value]
    source = parallel_state.get_model_parallel_src_rank()
    dist.broadcast_object_list(box, src=source, group=parallel_state.get_model_parallel_group())
    return box[0]
