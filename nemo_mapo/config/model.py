"""The audio LLM, its parallel layout and its optimiser."""

from typing import Annotated, Any, Literal

from pydantic import Field

from nemo_mapo.config.adapters import FreezeConfig, LoraConfig
from nemo_mapo.config.base import config_class
from nemo_mapo.config.fields import (
    AtLeastTwo,
    Count,
    CountOrZero,
    Decay,
    Epsilon,
    Flag,
    Index,
    LearningRate,
    LearningRateOrZero,
    PathText,
    Positive,
    Seconds,
    Weight,
)
from nemo_mapo.config.precision import PrecisionConfig

RecomputeModule = Literal["core_attn", "mlp", "moe", "layernorm"]
RopeScaling = Literal["linear", "llama3"]


@config_class
class ConvPerceptionConfig:
    """Small convolutional encoder over log-mel features (the embedded run)."""

    type: Literal["conv"] = "conv"
    """Small convolutional encoder."""
    mel_bins: Count = 32
    """Log-mel features per frame."""
    hop_seconds: Seconds = 0.02
    """Distance between frames."""
    window_seconds: Seconds = 0.04
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
    features: Literal["nemo_2_3", "nemo_2_5"] = "nemo_2_3"
    """Mel features of NeMo up to 2.3, or since 2.5, which pad the edges of a clip with zeros instead of mirrored
    samples and count one frame fewer."""
    restore_from_path: PathText | None = None
    """A .nemo file of an ASR model: a run starts with its preprocessor and encoder, and takes the rest from
    pretrained_checkpoint, if that is set."""


@config_class
class ProjectorConfig:
    """Maps an encoder's frames to the decoder's width."""

    type: Literal["linear", "mlp"] = "mlp"
    """One linear layer, or two with a GELU between them."""
    stack: Count = 1
    """Neighbouring frames that become one audio token; the last frames of a clip are padded with zeros."""


@config_class
class WhisperPerceptionConfig:
    """Whisper's encoder and a projector; examples/assemble.py writes this section for a model."""

    type: Literal["whisper"] = "whisper"
    """Whisper's encoder, through transformers."""
    encoder: dict[str, Any]
    """The encoder's fields of the model's config.json."""
    features: dict[str, Any]
    """The model's preprocessor_config.json: keys of transformers' WhisperFeatureExtractor."""
    projector: ProjectorConfig = ProjectorConfig(stack=4)


QwenOmniFamily = Literal["qwen2_5_omni", "qwen3_omni_moe"]


@config_class
class QwenOmniPerceptionConfig:
    """Audio encoder of Qwen2.5-Omni or Qwen3-Omni; examples/import_hf.py writes this section for a model."""

    type: Literal["qwen_omni"] = "qwen_omni"
    """Qwen's own encoder, through transformers."""
    family: QwenOmniFamily
    """Model family of the encoder."""
    encoder: dict[str, Any]
    """The model's thinker_config.audio_config; without a projector its output_dim is the decoder's hidden size."""
    features: dict[str, Any]
    """The model's preprocessor_config.json: keys of transformers' WhisperFeatureExtractor."""
    whole_frames: Flag = False
    """Qwen3-Omni: pad a clip with zeros to whole feature frames (10 ms), as vLLM does; its own processor drops the
    remainder. rollout.backend=vllm needs it."""
    projector: ProjectorConfig | None = None
    """Projector after the encoder's own, for a decoder of another model; null is none."""


PerceptionConfig = Annotated[
    ConvPerceptionConfig | NemoPerceptionConfig | QwenOmniPerceptionConfig | WhisperPerceptionConfig,
    Field(discriminator="type"),
]


@config_class
class DecoderConfig:
    """Megatron-core GPT decoder, with Megatron's names."""

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
    rotary_base: Count = 10000
    """Base of the rotary position embedding."""
    rope_scaling: RopeScaling | None = None
    """How rotary frequencies are stretched for longer contexts: uniformly, or by Llama 3.1's rule; null is off."""
    rope_scaling_factor: Positive = 1.0
    """Factor of `rope_scaling`."""
    qk_layernorm: Flag = True
    """RMS-normalise queries and keys per head."""
    layernorm_epsilon: Epsilon = 1e-6
    """Added to the mean square of every RMSNorm."""
    init_method_std: Positive = 0.02
    """Standard deviation of the initial weights."""
    share_embeddings_and_output_weights: Flag = True
    """Tied output head."""
    add_qkv_bias: Flag = False
    """Biases on the query, key and value projections (Qwen2.5)."""
    vocab_size: Count | None = None
    """Rows of the embedding, if there are more rows than tokens (Qwen pads it); null is the tokenizer's length."""
    num_moe_experts: AtLeastTwo | None = None
    """Experts per layer; null is a dense decoder."""
    moe_router_topk: Count = 2
    """Experts per token; their router weights are normalised to sum to 1."""
    moe_ffn_hidden_size: Count = 128
    """Inner width of an expert's SwiGLU."""
    moe_aux_loss_coeff: Weight = 0.0
    """Weight of the load-balancing loss, a mean over micro-batches; 0 is off. It sees padding tokens too."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activation recompute: whole layers below the first target layer, or the named modules of every layer."""
    recompute_modules: Annotated[tuple[RecomputeModule, ...], Field(min_length=1)] = ("core_attn",)
    """What `selective` recomputes; core attention is left out on target layers, whose mass needs its gradient."""

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_query_groups={self.num_query_groups}"
            )
        if self.kv_channels % 8:
            raise ValueError(f"kv_channels={self.kv_channels} must be a multiple of 8 (attention kernels need it)")
        if self.rope_scaling is None and self.rope_scaling_factor != 1:
            raise ValueError(
                f"rope_scaling_factor={self.rope_scaling_factor} without rope_scaling; set it to linear or llama3"
            )
        if self.num_moe_experts is not None and self.moe_router_topk > self.num_moe_experts:
            raise ValueError(f"moe_router_topk={self.moe_router_topk} exceeds num_moe_experts={self.num_moe_experts}")


@config_class
class SchedulerConfig:
    """Learning-rate schedule over optimiser steps."""

    name: Literal["constant", "cosine"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: CountOrZero = 5
    """Linear warm-up."""
    min_lr: LearningRateOrZero = 0.0
    """Floor of the cosine, reached at the last step."""


@config_class
class OptimizerConfig:
    """torch AdamW."""

    name: Literal["adamw"] = "adamw"
    """torch AdamW."""
    lr: LearningRate = 1e-6
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    eps: Epsilon = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Weight = 0.0
    """Weight decay of matrices; norms and biases have none."""
    sched: SchedulerConfig = SchedulerConfig()

    def __post_init__(self) -> None:
        if self.sched.min_lr > self.lr:
            raise ValueError(f"sched.min_lr={self.sched.min_lr} is above lr={self.lr}, the peak: the rate would rise")


@config_class
class ModelConfig:
    """The policy, its layout over devices, and its optimiser."""

    perception: PerceptionConfig = ConvPerceptionConfig()
    decoder: DecoderConfig = DecoderConfig()
    from_scratch: Flag = False
    """Start from random weights if the run has neither warm start nor checkpoint; false refuses such a run."""
    target_layers: tuple[Index, ...] | None = None
    """0-based decoder layers whose audio mass is measured; null is the last five (or all, if fewer)."""
    micro_batch_size: Count = 32
    """Completions per forward pass on one data-parallel rank."""
    global_batch_size: Count = 32
    """Completions per optimiser step, over all data-parallel ranks."""
    packed_tokens: Count | None = None
    """Train on rows packed up to this many tokens, without padding, instead of `micro_batch_size` padded rows."""
    shared_prompts: Flag = True
    """Read a prompt once for all of its completions in a forward pass; false reads it again for each."""
    tensor_model_parallel_size: Count = 1
    """Ranks over which heads, feed-forward columns and vocabulary are sharded."""
    sequence_parallel: Flag = False
    """Shard norms and residuals over the tensor-parallel ranks, by position."""
    pipeline_model_parallel_size: Count = 1
    """Stages; all target layers must lie on the last one."""
    expert_model_parallel_size: Count = 1
    """Data-parallel ranks over which the experts of a layer are sharded."""
    context_parallel_size: Count = 1
    """Only 1 is supported."""
    attention_backend: Literal["sdpa", "transformer_engine"] = "sdpa"
    """torch's attention, or Transformer Engine's linears, norms and attention (GPU; docs/status.md)."""
    precision: PrecisionConfig = PrecisionConfig()
    lora: LoraConfig | None = None
    """Train low-rank adapters; with them off the policy is its own reference. null trains the decoder's weights."""
    freeze: FreezeConfig = FreezeConfig()
    offload_reference: Flag = False
    """Keep the frozen reference of full fine-tuning in host memory except during its passes (on a GPU)."""
    optim: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        self._check_trained()
        self._check_target_layers()
        self._check_layout()
        self._check_shared_prompts()
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be a multiple of "
                f"micro_batch_size={self.micro_batch_size}"
            )

    def _check_shared_prompts(self) -> None:
        if self.shared_prompts and self.attention_backend == "transformer_engine":
            raise ValueError(
                "shared_prompts=true with attention_backend=transformer_engine: its kernels do not support rows whose "
                "completions share a prompt; set shared_prompts=false, or attention_backend=sdpa"
            )

    def _check_trained(self) -> None:
        if self.lora is not None and self.offload_reference:
            raise ValueError(
                "offload_reference=true with lora: the policy without its adapters is the reference, so there is no "
                "copy to offload; set it to false"
            )
        freeze = self.freeze
        if self.lora is None and freeze.perception and freeze.projector and freeze.decoder:
            raise ValueError("freeze.{perception,projector,decoder}=true leaves nothing to train; set one to false")

    def _check_target_layers(self) -> None:
        beyond = [layer for layer in self.target_layers or () if not 0 <= layer < self.decoder.num_layers]
        if beyond:
            raise ValueError(
                f"target_layers={list(self.target_layers or ())}: {beyond} beyond the model, "
                f"whose layers are 0..{self.decoder.num_layers - 1}"
            )
        if self.target_layers is not None and len(set(self.target_layers)) != len(self.target_layers):
            raise ValueError(f"target_layers={list(self.target_layers)} names a layer twice")
        if self.decoder.recompute_granularity == "full" and self.resolved_target_layers[0] == 0:
            raise ValueError(
                f"decoder.recompute_granularity=full recomputes the layers below the first target layer, and "
                f"target_layers={list(self.resolved_target_layers)} leave none; name later layers or set it to "
                "selective"
            )

    @property
    def restored_encoder(self) -> str | None:
        """The ASR model whose encoder a run starts with, if the config names one."""
        return self.perception.restore_from_path if isinstance(self.perception, NemoPerceptionConfig) else None

    @property
    def cut_over_ranks(self) -> list[str]:
        """The settings that shard the weights over ranks, as a user types them."""
        sizes = {name: value for name, value in vars(self).items() if name.endswith("_parallel_size")}
        return [f"model.{name}={value}" for name, value in sizes.items() if value != 1]

    def _check_layout(self) -> None:
        """ValueError for a layout that would not compute the same as an unsharded run."""
        tensor, stages = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        decoder = self.decoder
        if self.context_parallel_size != 1:
            raise ValueError(f"context_parallel_size={self.context_parallel_size} is not supported; set it to 1")
        shared_out = {
            "num_attention_heads": decoder.num_attention_heads,
            "num_query_groups": decoder.num_query_groups,
            "ffn_hidden_size": decoder.ffn_hidden_size,
        }
        for name, size in shared_out.items():
            if size % tensor:
                raise ValueError(f"decoder.{name}={size} must be a multiple of tensor_model_parallel_size={tensor}")
        if self.sequence_parallel and tensor == 1:
            raise ValueError("sequence_parallel=true needs tensor_model_parallel_size above 1; set it to false")
        if decoder.num_moe_experts is not None and tensor > 1 and not self.sequence_parallel:
            raise ValueError("experts with tensor_model_parallel_size above 1 need sequence_parallel=true")
        self._check_stages(stages)
        self._check_experts()

    def _check_stages(self, stages: int) -> None:
        layers = self.decoder.num_layers
        if layers % stages:
            raise ValueError(f"decoder.num_layers={layers} must be a multiple of pipeline_model_parallel_size={stages}")
        last_stage = layers - layers // stages
        early = [layer for layer in self.resolved_target_layers if layer < last_stage]
        if early:
            raise ValueError(
                f"target_layers={list(self.resolved_target_layers)}: the loss needs all of them on the last of "
                f"pipeline_model_parallel_size={stages} stages, which holds layers {last_stage}..{layers - 1} of "
                f"{layers}; {early} lie before. Name layers from {last_stage} upwards, or use fewer stages"
            )

    def _check_experts(self) -> None:
        experts, ranks = self.decoder.num_moe_experts, self.expert_model_parallel_size
        if ranks == 1:
            return
        if experts is None or experts % ranks:
            raise ValueError(
                f"expert_model_parallel_size={ranks} must divide decoder.num_moe_experts={experts}; set it to 1 for a "
                "dense decoder"
            )
        if self.packed_tokens is not None:
            raise ValueError(
                f"packed_tokens={self.packed_tokens} with expert_model_parallel_size={ranks}: ranks would run unequal "
                "numbers of micro-batches and wait for each other forever; set one of them to null or 1"
            )

    @property
    def resolved_freeze(self) -> FreezeConfig:
        """`freeze` with its defaults filled in."""
        adapted = self.lora is not None
        given = self.freeze
        return FreezeConfig(
            perception=adapted if given.perception is None else given.perception,
            projector=adapted if given.projector is None else given.projector,
            decoder=given.decoder,
        )

    @property
    def recomputed_layers_per_stage(self) -> tuple[int, ...]:
        """Layers of each pipeline stage that full recompute covers: all below the first target layer."""
        stages = self.pipeline_model_parallel_size
        per_stage = self.decoder.num_layers // stages
        first_target = self.resolved_target_layers[0]
        return tuple(min(per_stage, max(0, first_target - stage * per_stage)) for stage in range(stages))

    @property
    def resolved_target_layers(self) -> tuple[int, ...]:
        """`target_layers` with its default filled in."""
        if self.target_layers is not None:
            return tuple(sorted(self.target_layers))
        layers = self.decoder.num_layers
        return tuple(range(max(0, layers - DEFAULT_TARGET_DEPTH), layers))


DEFAULT_TARGET_DEPTH = 5
"""The paper steers the last five layers (43..47 of 48)."""
