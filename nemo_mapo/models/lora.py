"""LoRA on the decoder's projections: W x + scale * B A x, where only A and B are trained and W never changes.

The weights of a linear keep their names and checkpoint keys; `lora_a` and `lora_b` are siblings of `weight`.
"""

import math
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from nemo_mapo.config.adapters import FreezeConfig, LoraConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.linears import ColumnLinear, RowLinear

_ADAPTER = ("lora_a", "lora_b")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_PROJECTORS = ("projection.", "projector.", "module.modality_adapter.", "module.proj.")
"""Prefixes of the projector's parameters in the kinds of perception."""


class LoraLinear(nn.Module):
    """Base of the two adapted linears: one of Megatron's linears, plus scale * B A.

    Tensor-parallel ranks exchange activations where these are `rank` wide. Under sequence parallelism each rank knows
    the gradient of the unsharded one of A and B from its own positions only; Megatron adds such gradients up at the end
    of a step, as it does for norms.
    """

    cut: Literal["lora_a", "lora_b"]
    """Which of A and B is sharded over tensor-parallel ranks, like the weight; the other is whole on each."""
    cut_axis: int
    input_size: int
    output_size: int
    weight: nn.Parameter
    sequence_parallel: bool
    explicit_expert_comm: bool
    """Megatron's mark of an expert's linear whose tokens the dispatcher exchanges with other ranks."""
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float
    gate_and_up: bool
    """Whether the outputs are those of two matrices, each of them sharded over the ranks (SwiGLU)."""
    adapter_on: bool

    def attach(self, config: LoraConfig, *, gate_and_up: bool, generator: torch.Generator) -> None:
        """Make a fresh adapter: A as torch initialises linears, B zero; each rank keeps its part of the same draw."""
        self.scale = config.scale
        self.gate_and_up = gate_and_up
        self.adapter_on = True
        whole_a = torch.empty(config.rank, self.input_size)
        nn.init.kaiming_uniform_(whole_a, a=math.sqrt(5), generator=generator)
        self.lora_a = self._parameter("lora_a", whole_a)
        self.lora_b = self._parameter("lora_b", torch.zeros(self.output_size, config.rank))

    def _parameter(self, name: str, whole: Tensor) -> nn.Parameter:
        if name != self.cut:
            parameter = nn.Parameter(whole.to(self.weight))
            parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        else:
            parts = whole.chunk(parallel_state.get_tensor_model_parallel_world_size(), self.cut_axis)
            part = parts[parallel_state.get_tensor_model_parallel_rank()]
            parameter = nn.Parameter(part.to(self.weight).clone(memory_format=torch.contiguous_format))
            set_tensor_model_parallel_attributes(parameter, True, self.cut_axis, 1)
        # False on experts that are sharded over ranks: their gradients are summed over fewer ranks.
        parameter.allreduce = vars(self.weight).get("allreduce", True)  # type: ignore[attr-defined]
        return parameter

    def forward(
        self, hidden: Float[Tensor, "*tokens in"], *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "*out_tokens out"], Tensor | None]:
        """Output, and the bias for the caller to add, as Megatron's linears return them."""
        output, bias = super().forward(hidden, *args, **kwargs)
        if self.adapter_on:
            low = F.linear(hidden, self.lora_a)
            if not self.explicit_expert_comm:
                low = self.exchange(low)
            output = output + F.linear(low * self.scale, self.lora_b)
        return output, bias

    def exchange(self, low: Float[Tensor, "*tokens rank"]) -> Float[Tensor, "*out_tokens rank"]:
        """Bring A x to the positions that the output has, summed over the ranks' inputs."""
        raise NotImplementedError

    @torch.no_grad()
    def merged_weight(self) -> Float[Tensor, "out in"]:
        """This rank's part of W + scale * B A in a new tensor; added in float32 at least, rounded once."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        weight, a, b = (tensor.to(dtype) for tensor in (self.weight, self.lora_a, self.lora_b))
        return torch.addmm(weight, b, a, alpha=self.scale).to(self.weight.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[tuple[int, int, int]] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Megatron's state of the linear, and the adapter sharded alike, for a checkpoint that any layout reads."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        # Upstream treats parameters that it does not know as unsharded.
        key = f"{prefix}{self.cut}"
        part = make_tp_sharded_tensor_for_checkpoint(
            self.get_parameter(self.cut), key, self.cut_axis, prepend_offsets=sharded_offsets
        )
        state[key] = apply_swiglu_sharded_factory(part, sharded_offsets) if self.gate_and_up else part
        return state


class LoraColumnParallelLinear(LoraLinear, ColumnLinear):  # type: ignore[misc]
    """Outputs sharded over the ranks: A whole, B sharded."""

    cut, cut_axis = "lora_b", 0

    def exchange(self, low: Float[Tensor, "*tokens rank"]) -> Float[Tensor, "*out_tokens rank"]:
        """All positions; the gradient is summed over the ranks, each of which has the part from its own outputs."""
        if self.sequence_parallel:
            gathered: Tensor = gather_from_sequence_parallel_region(low)
            return gathered
        copied: Tensor = copy_to_tensor_model_parallel_region(low)
        return copied


class LoraRowParallelLinear(LoraLinear, RowLinear):  # type: ignore[misc]
    """Inputs sharded over the ranks: A sharded, B whole."""

    cut, cut_axis = "lora_a", 1

    def exchange(self, low: Float[Tensor, "*tokens rank"]) -> Float[Tensor, "*out_tokens rank"]:
        """The sum over the ranks; under sequence parallelism at this rank's positions only."""
        if self.sequence_parallel:
            scattered: Tensor = reduce_scatter_to_sequence_parallel_region(low)
            return scattered
        reduced: Tensor = reduce_from_tensor_model_parallel_region(low)
        return reduced


_ADAPTED = {ColumnParallelLinear: LoraColumnParallelLinear, RowParallelLinear: LoraRowParallelLinear}


def add_lora(decoder: GPTModel, config: LoraConfig, *, seed: int) -> None:
    """Freeze the decoder and give the target projections of its layers fresh adapters, which change nothing yet.

    Fresh adapters depend on the seed and the layer, not on the layout or torch's random state. Call it before the
    model is wrapped for data parallelism, which makes gradient buffers for what is trained.

    Raises:
        ValueError: if a target is not a linear of Megatron's local layer spec.
    """
    freeze_decoder(decoder)
    for layer in decoder.decoder.layers:
        targets = {name: name.rpartition(".")[2] for name, _ in layer.named_modules()}
        for name, target in targets.items():
            if target in config.targets:
                _adapt(
                    layer.get_submodule(name),
                    config,
                    gate_and_up=target == "linear_fc1" and decoder.config.gated_linear_unit,
                    generator=_generator(f"{seed} {layer.layer_number} {_in_whole_layer(name, decoder)}"),
                )


def _in_whole_layer(name: str, decoder: GPTModel) -> str:
    """The target of a linear, for an expert's preceded by the expert's number among those of all ranks."""
    target = name.rpartition(".")[2]
    expert = _EXPERT.search(name)
    if expert is None:
        return target
    local = decoder.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
    first = parallel_state.get_expert_model_parallel_rank() * local
    return f"{first + int(expert[1])} {target}"


def _generator(place: str) -> torch.Generator:
    """A separate generator for each place, so that pipeline stages draw the same values as a single process."""
    return torch.Generator().manual_seed(random.Random(place).getrandbits(63))


def _adapt(linear: nn.Module, config: LoraConfig, *, gate_and_up: bool, generator: torch.Generator) -> None:
    adapted = next((lora for kind, lora in _ADAPTED.items() if isinstance(linear, kind)), None)
    if adapted is None or isinstance(linear, LoraLinear):
        raise ValueError(
            f"lora.targets: a {type(linear).__name__} cannot have an adapter, only "
            f"{' and '.join(kind.__name__ for kind in _ADAPTED)} of Megatron's local layer spec can, and only one"
        )
    # In place, as torch's parametrizations do it: weights, their names and all references stay the same.
    linear.__class__ = adapted
    assert isinstance(linear, LoraLinear)
    linear.attach(config, gate_and_up=gate_and_up, generator=generator)


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name belongs to an adapter."""
    return name.rpartition(".")[2] in _ADAPTER


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block, the model is its base model, bit for bit.

    Without gradient only: recomputed activations would be those of the model as it is when the backward pass runs.
    """
    assert not torch.is_grad_enabled(), "adapters_off needs torch.no_grad() around it"
    linears = [module for module in model.modules() if isinstance(module, LoraLinear)]
    assert linears, "a model without adapters has none to switch off"
    before = [linear.adapter_on for linear in linears]
    try:
        for linear in linears:
            linear.adapter_on = False
        yield
    finally:
        for linear, was_on in zip(linears, before, strict=True):
            linear.adapter_on = was_on


def merged_state_dict(decoder: nn.Module) -> dict[str, Any]:
    """The state of a decoder without adapters that computes what this one does; its names are the base's.

    Merged weights are new tensors, all others those of the decoder. Under tensor parallelism it is this rank's part.
    """
    merged = {name: value for name, value in decoder.state_dict().items() if not is_adapter(name)}
    for name, module in decoder.named_modules():
        if isinstance(module, LoraLinear):
            merged[f"{name}.weight"] = module.merged_weight()
    return merged


def freeze(model: AudioLLM, config: FreezeConfig) -> None:
    """Stop training the parts that the config names; parts that are frozen already stay so."""
    if model.pre_process:
        for name, parameter in model.perception.named_parameters():
            if config.projector if name.startswith(_PROJECTORS) else config.perception:
                parameter.requires_grad_(False)
    if config.decoder:
        freeze_decoder(model.language_model)


def freeze_decoder(decoder: GPTModel) -> None:
    """Stop training the decoder's own weights; adapters are trained as before."""
    for name, parameter in decoder.named_parameters():
        if not is_adapter(name):
            parameter.requires_grad_(False)
    if decoder.pre_process:
        decoder.embedding.register_forward_hook(_join_graph)


def _join_graph(module: nn.Module, inputs: tuple[Any, ...], embeddings: Tensor) -> None:
    """Activation recompute gives the weights inside no gradient unless its input requires one."""
    if torch.is_grad_enabled() and not embeddings.requires_grad:
        embeddings.requires_grad_()
