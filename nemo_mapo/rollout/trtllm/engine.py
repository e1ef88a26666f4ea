"""The TensorRT-LLM engine itself, kept thin: tests put a Megatron decoder in its place (support/trtllm_runtime.py).

Megatron-core's TRTLLMHelper converts the weights and builds the engine, because NeMo's own exporter, on which
NeMo-Aligner's GPTGenerateTRTLLM is based, cannot build one with a prompt table. Loading, refitting and unloading are
NeMo's.
"""

import gc
import importlib.metadata
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from megatron.core import parallel_state
from torch import Tensor

from nemo_mapo.config.rollout import TrtllmConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.rollout.trtllm.calls import EngineSampling
from nemo_mapo.rollout.trtllm.release import refuse_nemo, refuse_release
from nemo_mapo.rollout.trtllm.weights import placed_weights

_DEVICE_VARIABLE = "DISABLE_TORCH_DEVICE_SET"


class TensorRTEngine:
    """A `TrtllmEngine` on this rank's GPU; tensor-parallel ranks hold a part each and make the same calls."""

    def __init__(self, model: AudioLLM, config: TrtllmConfig, *, batch_size: int, max_new_tokens: int) -> None:
        """Check the machine; nothing is built before the first `update`.

        Args:
            model: the policy whose decoder is exported.
            config: where, and how large the prompt table is.
            batch_size: completions of a call.
            max_new_tokens: of a completion.

        Raises:
            ValueError: TensorRT-LLM, a GPU or an environment variable is missing, or processes were started otherwise.
        """
        _refuse_machine(parallel_state.get_tensor_model_parallel_world_size())
        self._megatron = model.config
        self._config = config
        self._batch_size = batch_size
        self._max_new_tokens = max_new_tokens
        self._max_positions = model.max_positions
        self._rotary_base: float = model.rotary_base
        shards = parallel_state.get_tensor_model_parallel_world_size()
        self._vocab_size: int = math.ceil(model.vocab_size / shards) * shards
        self._dtype: torch.dtype = next(model.language_model.parameters()).dtype
        self._helper: Any = None
        Path(config.trt_model_dir).mkdir(parents=True, exist_ok=True)
        # Of this process alone: another run must not build over what is loaded again each step.
        self._folder = tempfile.TemporaryDirectory(dir=config.trt_model_dir, prefix="engine_")
        self._directory = Path(self._folder.name)

    @property
    def vocab_size(self) -> int:
        """See `TrtllmEngine`; a multiple of the tensor-parallel ranks."""
        return self._vocab_size

    @property
    def dtype(self) -> torch.dtype:
        """The policy's."""
        return self._dtype

    def update(self, weights: Mapping[str, Tensor]) -> None:
        """See `TrtllmEngine`. The weights on disk are those of the first call, so they are never used alone."""
        from nemo.export.trt_llm.tensorrt_llm_run import refit

        if self._helper is None:
            self._helper = self._built(dict(weights))
            self._load()
            # Better to find weights that cannot be refitted before a step was trained.
            placed_weights(self._helper.weights_converter.trtllm_model_weights, _weight_names())
            return
        converter = self._helper.weights_converter
        converter.convert(
            model_state_dict=dict(weights),
            trtllm_conversion_dict=self._helper.trtllm_conversion_dict,
            tokenizer_vocab_size=self._vocab_size,
        )
        # The converter copies to pinned memory without waiting.
        torch.cuda.synchronize()
        self._load()
        placed = placed_weights(converter.trtllm_model_weights, _weight_names())
        refit(placed)

    def generate(
        self,
        *,
        batch_input_ids: Sequence[Int[Tensor, "_"]],
        sampling: EngineSampling,
        prompt_table: Float[Tensor, "rows hidden"] | None,
        prompt_tasks: str | None,
    ) -> Mapping[str, Tensor]:
        """See `TrtllmEngine`; the same on all tensor-parallel ranks."""
        from tensorrt_llm.runtime import SamplingConfig

        config = SamplingConfig(end_id=sampling.end_id, pad_id=sampling.pad_id)
        if unknown := config.update(**vars(sampling)):
            raise RuntimeError(f"this TensorRT-LLM's SamplingConfig does not know {', '.join(unknown)}")
        output: Mapping[str, Tensor] = _runner().generate(
            batch_input_ids=list(batch_input_ids),
            sampling_config=config,
            prompt_table=prompt_table,
            prompt_tasks=prompt_tasks,
            streaming=False,
        )
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            source = parallel_state.get_tensor_model_parallel_src_rank()
            for tensor in output.values():
                torch.distributed.broadcast(tensor, src=source, group=parallel_state.get_tensor_model_parallel_group())
        return output

    def unload(self) -> None:
        """See `TrtllmEngine`."""
        from nemo.export.trt_llm.tensorrt_llm_run import unload_engine

        if _runner() is not None:
            unload_engine()
            gc.collect()
            torch.cuda.empty_cache()

    def _built(self, weights: dict[str, Tensor]) -> Any:
        """Megatron-core's helper, which keeps the converter, when the engine lies on the disk."""
        from megatron.core.export.data_type import DataType
        from megatron.core.export.model_type import ModelType
        from megatron.core.export.trtllm.trtllm_helper import TRTLLMHelper
        from nemo.export.trt_llm.converter.utils import init_model_parallel_from_nemo

        # Each replica gets an MPI communicator of its own, in which TensorRT-LLM looks for tensor-parallel ranks.
        init_model_parallel_from_nemo(False)
        helper = TRTLLMHelper(
            transformer_config=self._megatron,
            model_type=ModelType.llama,
            position_embedding_type="rope",
            max_position_embeddings=self._max_positions,
            rotary_base=self._rotary_base,
            activation="swiglu",
            # The head is written out, tied or not.
            share_embeddings_and_output_weights=False,
        )
        converted, configs = helper.get_trtllm_pretrained_config_and_model_weights(
            model_state_dict=weights,
            dtype=DataType[str(self._dtype).removeprefix("torch.")],
            on_device_distributed_conversion=True,
            vocab_size=self._vocab_size,
            gpus_per_node=torch.cuda.device_count(),
        )
        torch.cuda.synchronize()
        engine = helper.build_and_save_engine(
            engine_dir=str(self._directory),
            trtllm_model_weights=converted[0],
            trtllm_model_config=configs[0],
            max_input_len=self._max_positions - self._max_new_tokens,
            max_output_len=self._max_new_tokens,
            max_seq_len=self._max_positions,
            max_batch_size=self._batch_size,
            max_prompt_embedding_table_size=self._config.max_prompt_embedding_table_size,
            use_refit=True,
        )
        torch.distributed.barrier()
        # NeMo's loader looks for it under the number of the process.
        path = self._directory / f"config_{torch.distributed.get_rank()}.json"
        path.write_text(json.dumps(engine.config.to_dict()))
        return helper

    def _load(self) -> None:
        from nemo.export.trt_llm.tensorrt_llm_run import load_distributed

        rank = parallel_state.get_tensor_model_parallel_rank()
        load_distributed(str(self._directory), rank, torch.cuda.device_count())


def _weight_names() -> set[str]:
    """The weights that the loaded engine accepts; NeMo's refit only logs what is missing on either side."""
    import tensorrt

    refitter = tensorrt.Refitter(_runner().session.runtime.engine, tensorrt.Logger(tensorrt.Logger.ERROR))
    return set(refitter.get_all_weights())


def _runner() -> Any:
    """NeMo's loaded ModelRunner; None if none is loaded."""
    from nemo.export.trt_llm.tensorrt_llm_run import tensorrt_llm_worker_context

    return tensorrt_llm_worker_context.decoder


def _refuse_machine(shards: int) -> None:
    """ValueError if NeMo's or TensorRT-LLM's part is missing, or this process was not started as they need."""
    refuse_nemo(importlib.metadata.version("nemo-toolkit"))
    if not torch.cuda.is_available():
        raise ValueError("rollout.backend=trtllm needs a GPU; rollout.backend=megatron runs everywhere")
    try:
        refuse_release(importlib.metadata.version("tensorrt-llm"))
        import tensorrt_llm
        import tensorrt_llm.runtime
    except ImportError as error:
        raise ValueError(
            f"rollout.backend=trtllm: TensorRT-LLM cannot be imported ({error}); use the container of "
            "docs/container.md, or rollout.backend=megatron or vllm"
        ) from error
    if os.environ.get(_DEVICE_VARIABLE) != "1":
        raise ValueError(
            f"rollout.backend=trtllm: set the environment variable {_DEVICE_VARIABLE}=1 before the run, or "
            "TensorRT-LLM moves this process to another GPU"
        )
    known = (tensorrt_llm.mpi_rank(), tensorrt_llm.mpi_world_size())
    started = (torch.distributed.get_rank(), torch.distributed.get_world_size())
    if shards > 1 and known != started:
        raise ValueError(
            f"rollout.backend=trtllm with model.tensor_model_parallel_size={shards} talks through MPI, for which this "
            f"is process {known[0]} of {known[1]}, not {started[0]} of {started[1]}: start the run with mpirun or "
            "srun --mpi=pmix"
        )
