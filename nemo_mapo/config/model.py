"""The audio LLM, its parallel layout and its optimiser."""

from typing import Annotated, Any, Literal

from pydantic import Field

from nemo_mapo.config.base import config_class

Count = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


@config_class
class ConvPerceptionConfig:
    """Small convolutional encoder over log-mel features (the embedded run)."""

    type: Literal["conv"] = "conv"
    """Small convolutional encoder."""
    mel_bins: Count = 32
    """Log-mel features per frame."""
    hop_seconds: Annotated[float, Field(gt=0)] = 0.02
    """Distance of frames."""
    window_seconds: Annotated[float, Field(gt=0)] = 0.04
    """Length of a frame's window."""
    channels: Count = 128
    """Width of the convolutions."""
    downsampling: Literal[1, 2, 4, 8] = 4
    """Frames per audio token, by stride-2 convolutions."""


@config_class
class NemoPerceptionConfig:
    """NeMo's AudioPerceptionModule: preprocessor, encoder, modality adapter, projection."""

    type: Literal["nemo"] = "nemo"
    """NeMo's AudioPerceptionModule."""
    module: dict[str, Any]
    """The module's own config, as in NeMo's speech-LLM examples; its output_dim is set to the decoder's hidden size."""


PerceptionConfig = Annotated[ConvPerceptionConfig | NemoPerceptionConfig, Field(discriminator="type")]


@config_class
class DecoderConfig:
    """Megatron-core GPT decoder, in Megatron's names."""

    num_layers: Count = 5
    """Transformer layers."""
    hidden_size: Count = 192
    """Width of the residual stream."""
    num_attention_heads: Count = 6
    """Query heads."""
    num_query_groups: Count = 2
    """Key and value heads (grouped-query attention)."""
    kv_channels: Count = 32
    """Width of a head."""
    ffn_hidden_size: Count = 512
    """Inner width of the SwiGLU."""
    max_position_embeddings: Count = 512
    """Longest prompt + completion, in tokens."""
    rotary_base: Annotated[int, Field(gt=0)] = 10000
    """Base of the rotary position embedding."""
    qk_layernorm: bool = True
    """RMS-normalise queries and keys per head."""
    layernorm_epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the mean square of every RMSNorm."""
    init_method_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights."""
    share_embeddings_and_output_weights: bool = True
    """Tied output head."""
    num_moe_experts: Count | None = None
    """Experts per layer; None is a dense decoder. Not supported yet."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activation recompute. Not supported yet."""

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_query_groups={self.num_query_groups}"
            )
        if self.kv_channels % 8:
            raise ValueError(f"kv_channels={self.kv_channels} must be a multiple of 8 (attention kernels need it)")
        if self.num_moe_experts is not None:
            raise ValueError(f"num_moe_experts={self.num_moe_experts} is not supported yet; set it to null")
        if self.recompute_granularity is not None:
            raise ValueError(f"recompute_granularity={self.recompute_granularity} is not supported yet; set it to null")


@config_class
class SchedulerConfig:
    """Learning-rate schedule over optimiser steps."""

    name: Literal["constant", "cosine"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    """Linear warm-up."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Floor of the cosine, reached at the last step."""


@config_class
class OptimizerConfig:
    """torch AdamW."""

    name: Literal["adamw"] = "adamw"
    """torch AdamW."""
    lr: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of matrices; norms and biases have none."""
    sched: SchedulerConfig = SchedulerConfig()


@config_class
class ModelConfig:
    """The policy, how it is laid out over devices, and how it is optimised."""

    perception: PerceptionConfig = ConvPerceptionConfig()
    decoder: DecoderConfig = DecoderConfig()
    target_layers: tuple[int, ...] | None = None
    """0-based decoder layers whose audio mass is measured; null is the last five (or all, if fewer)."""
    micro_batch_size: Count = 32
    """Completions per forward pass."""
    global_batch_size: Count = 32
    """Completions per optimiser step."""
    tensor_model_parallel_size: Count = 1
    """Only 1 is supported yet."""
    pipeline_model_parallel_size: Count = 1
    """Only 1 is supported yet."""
    context_parallel_size: Count = 1
    """Only 1 is supported yet."""
    expert_model_parallel_size: Count = 1
    """Only 1 is supported yet."""
    sequence_parallel: bool = False
    """Not supported yet."""
    optim: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        sizes = {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "context_parallel_size": self.context_parallel_size,
            "expert_model_parallel_size": self.expert_model_parallel_size,
        }
        for name, size in sizes.items():
            if size != 1:
                raise ValueError(f"{name}={size} is not supported yet; set it to 1")
        if self.sequence_parallel:
            raise ValueError("sequence_parallel=true is not supported yet; set it to false")
        beyond = [layer for layer in self.target_layers or () if not 0 <= layer < self.decoder.num_layers]
        if beyond:
            raise ValueError(
                f"target_layers={list(self.target_layers or ())}: {beyond} beyond the model, "
                f"whose layers are 0..{self.decoder.num_layers - 1}"
            )
        if self.target_layers is not None and len(set(self.target_layers)) != len(self.target_layers):
            raise ValueError(f"target_layers={list(self.target_layers)} names a layer twice")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be a multiple of "
                f"micro_batch_size={self.micro_batch_size}"
            )

    @property
    def resolved_target_layers(self) -> tuple[int, ...]:
        """`target_layers` with its default filled in."""
        if self.target_layers is not None:
            return tuple(sorted(self.target_layers))
        layers = self.decoder.num_layers
        return tuple(range(max(0, layers - DEFAULT_TARGET_DEPTH), layers))


DEFAULT_TARGET_DEPTH = 5
"""The paper steers the last five layers (43..47 of 48)."""
