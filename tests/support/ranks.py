"""Run a function on several gloo ranks of this machine: for tests of what a split model computes."""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from nemo_mapo.platform import forget_main_module

TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for each other: a loaded machine is slow, and a hang is rare."""
PRELOADED = (
    "nemo.core.config",
    "nemo_mapo.launch",
    "nemo_mapo.config.evaluation",
    "nemo_mapo.evaluation.benchmarks.run",
    "nemo_mapo.evaluation.grounding.run",
    "nemo_mapo.data.importers.prepare",
    "nemo_mapo.models.hf.convert",
    "nemo_mapo.training.assemble",
    "transformers.models.qwen2_5_omni.modeling_qwen2_5_omni",
    "transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe",
)
"""What ranks and commands of examples/ import."""
_GOODBYE_SECONDS = 5.0


def run_on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on every rank, in processes of their own; return what each gave, by rank.

    The function must be importable by its name. It finds torch.distributed started, and no Megatron groups.

    Raises:
        RuntimeError: with the traceback of the first rank that failed.
    """
    forks = context()
    # By plain pickle: that of multiprocessing would share tensors with a process that may be gone.
    call = pickle.dumps((function, arguments))
    with tempfile.TemporaryDirectory() as folder:
        pipes = [forks.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            forks.Process(target=_work, args=(rank, world_size, folder, sender, call))
            for rank, (_, sender) in enumerate(pipes)
        ]
        for rank, (_, sender) in zip(ranks, pipes, strict=True):
            rank.start()
            # Ours, so that the end of a rank that dies is noticed.
            sender.close()
        try:
            return _collect([receiver for receiver, _ in pipes])
        finally:
            for rank in ranks:
                # Ranks that are done end by themselves, and with them what they started.
                rank.join(timeout=_GOODBYE_SECONDS)
                rank.terminate()
                rank.join()


def _collect(receivers: list[Connection]) -> list[Any]:
    results: list[Any] = [None] * len(receivers)
    waiting = dict(enumerate(receivers))
    deadline = TIMEOUT.total_seconds()
    while waiting:
        ready = multiprocessing.connection.wait(waiting.values(), timeout=deadline)
        if not ready:
            raise RuntimeError(f"ranks {sorted(waiting)} gave no result within {TIMEOUT}")
        for rank in [rank for rank, receiver in waiting.items() if receiver in ready]:
            try:
                succeeded, value = pickle.loads(waiting.pop(rank).recv_bytes())
            except EOFError as error:
                raise RuntimeError(f"rank {rank} died; what it wrote to stderr says why") from error
            if not succeeded:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return results


@cache
def context() -> ForkServerContext:
    """Start processes as forks of one clean process that has imported everything.

    Importing takes longer than most tests.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(list(PRELOADED))
    return forks


def _work(rank: int, world_size: int, folder: str, sender: Connection, call: bytes) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    # What upstream spawns from here (the queue of its checkpoint writer) would import the test runner again.
    forget_main_module()
    try:
        function, arguments = pickle.loads(call)
        store = FileStore(str(Path(folder, "rendezvous")), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        message = (True, function(*arguments))
    # Whatever happened is told to the parent, which raises it.
    except BaseException:
        message = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(message))
    sender.close()
    # A rank that failed must not wait for the others.
    if message[0]:
        dist.barrier()
        dist.destroy_process_group()
