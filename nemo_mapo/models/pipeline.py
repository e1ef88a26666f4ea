"""Forward passes without gradient, whatever pipeline, sequence or expert parallelism the model has."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from nemo_mapo.models.audio_llm import AudioLLM, AudioLLMOutput
from nemo_mapo.upstream.megatron import receive_from_previous_stage, send_to_next_stage


def forward_all_stages(model: AudioLLM, *args: Any, **kwargs: Any) -> AudioLLMOutput | None:
    """Call `model` on every stage in turn, each with the same arguments; None on all stages but the last."""
    assert not torch.is_grad_enabled(), "training runs through Megatron's pipeline schedule"
    if not model.pre_process:
        model.set_input_tensor(receive_from_previous_stage(model.config))
    output = model(*args, **kwargs)
    if isinstance(output, AudioLLMOutput):
        return output
    send_to_next_stage(output, model.config)
    return None


def from_last_stage(tensor: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The last stage's tensor (None elsewhere), on all stages; with the dtype and device of `like`."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        assert tensor is not None
        return tensor
    received = like.new_empty(shape) if tensor is None else tensor.contiguous()
    torch.distributed.broadcast(
        received,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return received


@contextmanager
def whole_sequences(model: AudioLLM) -> Iterator[None]:
    """Switch sequence parallelism off: a decoding step has one position, which cannot be sharded."""
    if not model.config.sequence_parallel:
        yield
        return
    switched = [module for module in model.modules() if vars(module).get("sequence_parallel") is True]
    model.config.sequence_parallel = False
    for module in switched:
        module.sequence_parallel = False
    try:
        yield
    finally:
        model.config.sequence_parallel = True
        for module in switched:
            module.sequence_parallel = True


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation and back, module by module: frozen parts may have been in evaluation before."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True
