"""Makes a host without CUDA acceptable to upstream code that assumes it; the only module that patches anything.

Entry points call `install_cpu_host()` once, before models are built. On a machine with CUDA it does nothing.
What is replaced is listed function by function, so that a reader sees how little upstream really needs.
"""

import functools
import inspect
import os
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
from torch._C._distributed_c10d import HashStore

_CPU = torch.device("cpu")
_SINGLE_PROCESS_TIMEOUT = timedelta(minutes=10)


def hide_cuda_devices() -> None:
    """Make this process, and those it starts, a CPU host even where there is a GPU.

    Training on a GPU is not supported yet, and half of upstream would move there by itself. Call it before anything
    asks torch for devices: entry points do so first of all.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def on_cpu_host() -> bool:
    """Whether this process has no CUDA device to use."""
    return not torch.cuda.is_available()


def host_device() -> torch.device:
    """The device this process computes on."""
    return _CPU if on_cpu_host() else torch.device("cuda", torch.cuda.current_device())


class _CpuTorch(ModuleType):
    """`torch` as one upstream module sees it on a CPU host: factories asked for "cuda" answer on the CPU."""

    _FACTORIES = frozenset({"tensor", "zeros", "ones", "empty", "full", "arange"})

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in self._FACTORIES:
            return value

        @functools.wraps(value)
        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = _CPU
            return value(*args, **kwargs)

        return on_cpu


@functools.cache
def install_cpu_host() -> None:
    """Replace the CUDA calls that Megatron-core and NeMo-Aligner make on the paths we use; a no-op with CUDA.

    Idempotent.
    """
    if not on_cpu_host():
        return
    _answer_device_questions()
    _accept_new_checkpoint_writer()
    _let_aligner_timer_count()


def _answer_device_questions() -> None:
    """Megatron-core allocates on `torch.cuda.current_device()`; NeMo-Aligner synchronises around its timers."""
    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.empty_cache = lambda: None


def _cpu_device() -> torch.device:
    """Upstream passes what it gets on as a device, so a device serves as well as a number."""
    return _CPU


def _accept_new_checkpoint_writer() -> None:
    """torch >= 2.7 added a required argument to its checkpoint writer that megatron-core 0.12 does not pass."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as megatron_writer
    import torch.distributed.checkpoint.filesystem as torch_writer

    parameter = "serialization_format"
    if parameter not in inspect.signature(torch_writer._write_item).parameters:
        return
    if parameter in inspect.getsource(megatron_writer):
        return
    megatron_writer._write_item = functools.partial(
        torch_writer._write_item, serialization_format=torch_writer.SerializationFormat.TORCH_SAVE
    )


def _let_aligner_timer_count() -> None:
    """NeMo-Aligner's run timer broadcasts a tensor it creates with device="cuda"."""
    import nemo_aligner.utils.distributed as aligner

    aligner.torch = _CpuTorch()


def initialize_single_process() -> None:
    """Start torch.distributed and Megatron's process groups for one process, if they are not there yet.

    Under torchrun the environment says rank and world size; more than one process is refused until the
    parallel modes are supported.
    """
    from megatron.core import parallel_state

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != 1:
        raise ValueError(f"WORLD_SIZE={world_size}: only one process is supported yet; start without torchrun")
    if not torch.distributed.is_initialized():
        backend = "gloo" if on_cpu_host() else "nccl"
        torch.distributed.init_process_group(
            backend, store=HashStore(), rank=0, world_size=1, timeout=_SINGLE_PROCESS_TIMEOUT
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
