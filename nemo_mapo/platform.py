"""Makes a host without CUDA acceptable to upstream code that assumes it; the only module that patches anything.

Entry points call `install_cpu_host()` once, before models are built. On a machine with CUDA it does nothing.
`initialize_parallel` replaces Megatron's queue of write results everywhere.
What is replaced is listed function by function, so that a reader sees how little upstream really needs.
"""

import contextlib
import functools
import inspect
import os
import pickle
import queue
import sys
import tempfile
from datetime import timedelta
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

_CPU = torch.device("cpu")
_RANK_TIMEOUT = timedelta(minutes=10)


def hide_cuda_devices() -> None:
    """Make this process, and those it starts, a CPU host even if there is a GPU.

    Half of upstream would move to the GPU unasked. Call it before anything asks torch for devices: entry points do so
    first, unless they train on the GPU.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def on_cpu_host() -> bool:
    """Whether this process has no CUDA device to use."""
    return not torch.cuda.is_available()


class _CpuTorch(ModuleType):
    """`torch` as one upstream module sees it on a CPU host: factories asked for "cuda" allocate on the CPU."""

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
    _keep_tensors_where_they_are()
    _give_random_state_of_the_cpu()
    _let_streams_stand_still()
    _let_experts_count_on_the_cpu()
    _recompute_without_fp8()
    _accept_new_checkpoint_writer()
    _allocate_on_the_cpu()


def _answer_device_questions() -> None:
    """Megatron-core allocates on `torch.cuda.current_device()`; NeMo-Aligner synchronises around its timers."""
    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.empty_cache = lambda: None


def _cpu_device() -> torch.device:
    """Upstream passes the result on as a device, so a device works as well as an index."""
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


def _keep_tensors_where_they_are() -> None:
    """Megatron moves tied embeddings and the pipeline's token count with `.cuda()`."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _give_random_state_of_the_cpu() -> None:
    """Activation recompute and sequence parallelism save and restore the random state of the device."""
    import megatron.core.tensor_parallel.random as megatron_random

    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


class _StillStream:
    """A CUDA stream on which everything has already completed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self) -> "_StillStream":
        """An event that is over: only `synchronize` is called on it."""
        return self


def _let_streams_stand_still() -> None:
    """The expert dispatcher copies its counts on a stream of its own."""
    torch.cuda.Stream = _StillStream  # type: ignore[misc,assignment]
    torch.cuda.current_stream = lambda *args: _StillStream()  # type: ignore[assignment]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]


def _let_experts_count_on_the_cpu() -> None:
    """The expert dispatcher turns its split sizes into numpy only if they come from a GPU."""
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    def as_counts(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher.maybe_move_tensor_to_cpu = as_counts


def _recompute_without_fp8() -> None:
    """Megatron-core 0.19 asks Transformer Engine, which is not there, for its FP8 state even if told `fp8=False`."""
    from megatron.core.tensor_parallel import CheckpointWithoutOutput

    if "fp8" in inspect.signature(CheckpointWithoutOutput).parameters:
        CheckpointWithoutOutput.__init__.__defaults__ = (None,)


def _allocate_on_the_cpu() -> None:
    """Modules that create tensors with device="cuda": NeMo-Aligner's run timer, Megatron's schedules and experts."""
    import megatron.core.pipeline_parallel.schedules as schedules
    import megatron.core.transformer.moe.moe_utils as moe_utils

    modules = [schedules, moe_utils]
    if find_spec("nemo_aligner") is not None:
        import nemo_aligner.utils.distributed as aligner

        modules.append(aligner)
    for module in modules:
        module.torch = _CpuTorch()


class _ResultFile:
    """A queue for one item, of any size, from a forked process to its parent; needs no helper process."""

    def __init__(self) -> None:
        # In memory, because a disk may be full.
        if sys.platform == "linux":
            self._file = os.fdopen(os.memfd_create("write-results"), "w+b")
        else:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115

    def put(self, item: Any) -> None:
        """Store the item."""
        pickle.dump(item, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Take the item; queue.Empty if there is none."""
        self._file.seek(0)
        try:
            item = pickle.load(self._file)
        except EOFError as error:
            raise queue.Empty from error
        self._file.seek(0)
        self._file.truncate()
        return item


def _report_writes_through_a_file() -> None:
    """Megatron spawns a process of hundreds of megabytes for one queue, and that process outlives a killed trainer."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as megatron_writer

    if getattr(megatron_writer, "_results_queue", "absent") is None:
        megatron_writer._results_queue = _ResultFile()


def forget_main_module() -> None:
    """Let spawned processes start without importing this one's main module again."""
    sys.modules["__main__"] = ModuleType("__main__")


def initialize_parallel(*, tensor: int = 1, pipeline: int = 1, expert: int = 1, seed: int = 0) -> None:
    """Start torch.distributed and Megatron's process groups for the layout, unless they already exist.

    Rank and world size come from the environment that torchrun (or SLURM's launcher) sets; without it there is one
    process. World size / (tensor * pipeline) is the data-parallel size.

    Raises:
        ValueError: the number of processes is not a multiple of tensor * pipeline * expert, or the groups already
            exist for another layout.
    """
    from megatron.core import parallel_state, tensor_parallel

    _report_writes_through_a_file()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_initialized():
        backend = "gloo" if on_cpu_host() else "nccl"
        if not on_cpu_host():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if world_size == 1:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=_RANK_TIMEOUT)
        else:
            dist.init_process_group(backend, timeout=_RANK_TIMEOUT)
    world_size = dist.get_world_size()
    if world_size % (tensor * pipeline * expert):
        raise ValueError(
            f"{world_size} processes cannot be laid out as tensor_model_parallel_size={tensor} x "
            f"pipeline_model_parallel_size={pipeline} (x expert_model_parallel_size={expert}); start a multiple of "
            f"{tensor * pipeline * expert}"
        )
    if parallel_state.model_parallel_is_initialized():
        found = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
        )
        if found != (tensor, pipeline, expert):
            raise ValueError(f"this process is already laid out as (tensor, pipeline, expert) = {found}")
        return
    parallel_state.initialize_model_parallel(tensor, pipeline, expert_model_parallel_size=expert)
    state = torch.get_rng_state()
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    if on_cpu_host():
        # On a CPU host, the call above has seeded the only generator.
        torch.set_rng_state(state)
