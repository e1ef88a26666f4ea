"""Plans the memory of a run before it starts: the needs of a GPU of every pipeline stage, and whether they fit."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.config.plan import PlanConfig
from nemo_mapo.config.precision import PrecisionConfig
from nemo_mapo.config.run import RunConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.lora import add_lora, freeze, is_adapter
from nemo_mapo.training.optimizer import is_expert
from nemo_mapo.training.plan_activations import (
    MicroBatch,
    SharedPrompts,
    kv_cache_bytes,
    logits_bytes,
    perception_bytes,
    recompute_bytes,
    stage_bytes,
)

GB = 1e9
_FLOAT = 4
_START_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128
"""Elements to which Megatron's distributed optimiser aligns a parameter and a bucket in its buffers."""


@dataclass(frozen=True, kw_only=True)
class StaticMemory:
    """Bytes that a rank holds permanently; exact."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    """The frozen copy that full fine-tuning needs, unless it is kept in host memory."""
    trained: int
    """Number of trained parameters."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Bytes of a rank of one pipeline stage."""

    static: StaticMemory
    activations: int
    """Decoder layers, for all micro-batches in flight, and what recompute adds; estimated."""
    perception: int
    """Activations of the audio encoder; estimated."""
    logits: int
    kv_cache: int
    offloaded: int
    """The reference that is loaded from host memory for its passes."""

    @property
    def held(self) -> int:
        """Permanently allocated bytes."""
        return self.static.weights + self.static.gradients + self.static.optimizer + self.static.reference

    @property
    def peak(self) -> int:
        """The largest allocation at once: a training step, generation or a pass of an offloaded reference."""
        training = self.activations + self.perception + self.logits
        return self.held + max(training, self.kv_cache, self.offloaded)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs, by pipeline stage."""

    stages: tuple[StagePlan, ...]
    tokens_per_step: int
    """Prompt and completion tokens of a rollout batch, all ranks together."""
    tokens_per_pass: int
    """Tokens of a micro-batch of one data-parallel rank."""
    left_out: tuple[str, ...]
    """What the numbers leave out."""


@contextmanager
def pretended_rank(model: ModelConfig, *, world_size: int, stage: int) -> Iterator[None]:
    """Megatron's groups as the first rank of a pipeline stage sees them, in one process and without communication."""
    # Registers the backend `fake`.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a plan is made in a process of its own"
    rank = stage * (world_size // model.pipeline_model_parallel_size)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            model.tensor_model_parallel_size,
            model.pipeline_model_parallel_size,
            expert_model_parallel_size=model.expert_model_parallel_size,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def static_memory(config: RunConfig, *, stage: int, vocab_size: int) -> StaticMemory:
    """Build this stage's part of the model without storage, and count.

    The first tensor- and data-parallel rank represents all, because the others hold the same amount.
    """
    # Weights of Transformer Engine's modules have the same shapes, and need a GPU to be made.
    plain = replace(config.model, attention_backend="sdpa", precision=PrecisionConfig())
    dtype = torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32
    with pretended_rank(plain, world_size=config.trainer.world_size, stage=stage), torch.device("meta"):
        model = AudioLLM(
            plain,
            vocab_size=vocab_size,
            audio_token_id=0,
            sample_rate=config.data.train_ds.sample_rate,
            params_dtype=dtype,
        )
        start = parameter_bytes(model.parameters())
        if plain.lora is not None:
            add_lora(model.language_model, plain.lora, seed=config.seed)
        freeze(model, plain.resolved_freeze)
        return _count(config, model, start)


def _count(config: RunConfig, model: AudioLLM, start: int) -> StaticMemory:
    distributed = config.trainer.accelerator == "gpu"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    weights, gradients, optimizer = parameter_bytes(frozen), 0, 0
    for group in buffer_groups(trained):
        replicas = data_parallel_ranks(group[0])
        elements = buffer_elements(group, replicas=replicas if distributed else None)
        narrow = group[0].element_size() < _FLOAT
        weights += (elements if distributed else sum(p.numel() for p in group)) * group[0].element_size()
        gradients += elements * _FLOAT
        # Two moments, and main weights if the model's are narrower.
        optimizer += (elements // replicas if distributed else elements) * _FLOAT * (3 if narrow else 2)
    if config.model.lora is not None:
        start = parameter_bytes(
            [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and not is_adapter(name)
            ]
        )
    full = not config.model.offload_reference
    return StaticMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        reference=start if full else 0,
        trained=sum(parameter.numel() for parameter in trained),
    )


def parameter_bytes(parameters: Iterator[nn.Parameter] | Sequence[nn.Parameter]) -> int:
    """Size of some weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def data_parallel_ranks(parameter: nn.Parameter) -> int:
    """Ranks that hold the same weight."""
    if is_expert(parameter):
        return int(parallel_state.get_expert_data_parallel_world_size())
    return int(parallel_state.get_data_parallel_world_size())


def buffer_groups(trained: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that share one of Megatron's gradient buffers."""
    groups: dict[tuple[torch.dtype, bool], list[nn.Parameter]] = {}
    for parameter in trained:
        groups.setdefault((parameter.dtype, is_expert(parameter)), []).append(parameter)
    return list(groups.values())


def buffer_elements(group: Sequence[nn.Parameter], *, replicas: int | None) -> int:
    """Elements of a buffer; with the distributed optimiser over `replicas` ranks it is padded as Megatron pads it."""
    if replicas is None:
        return sum(parameter.numel() for parameter in group)
    bucket = math.lcm(replicas, _BUCKET_ALIGNMENT)
    end = bucket_start = 0
    for parameter in reversed(group):
        start = _aligned(end, _START_ALIGNMENT)
        # A tied embedding that two stages hold has a bucket of its own.
        alone = bool(vars(parameter).get("shared_embedding", False))
        if alone and start > bucket_start:
            start = _aligned(start, bucket)
        end = start + parameter.numel()
        if alone:
            end = bucket_start = _aligned(end, bucket)
    return _aligned(end, bucket)


def _aligned(elements: int, multiple: int) -> int:
    return math.ceil(elements / multiple) * multiple


def make_plan(config: RunConfig, plan: PlanConfig, *, vocab_size: int) -> Plan:
    """Plan every pipeline stage of a run."""
    model, group = config.model, config.trainer.mapo.num_rollouts_per_prompt
    row_tokens = plan.sequence_tokens or model.decoder.max_position_embeddings
    shared = _shared_prompts(config, row_tokens)
    rows = model.micro_batch_size if model.packed_tokens is None else max(1, model.packed_tokens // row_tokens)
    tokens = rows * row_tokens if model.packed_tokens is None else model.packed_tokens
    if shared is not None:
        rows, tokens = shared.completions, shared.tokens
    batch = MicroBatch(
        tokens=tokens,
        shared=shared,
        clips=math.ceil(rows / group),
        audio_seconds=plan.audio_seconds,
        vocab_size=math.ceil(vocab_size / model.tensor_model_parallel_size) * model.tensor_model_parallel_size,
        width=2 if config.trainer.precision == "bf16" else _FLOAT,
        measures_mass=config.objective.captures_audio_mass,
        cuda=config.trainer.accelerator == "gpu",
    )
    stages = range(model.pipeline_model_parallel_size)
    return Plan(
        stages=tuple(_plan_stage(config, batch, stage, row_tokens, vocab_size, rows) for stage in stages),
        tokens_per_step=config.data.train_ds.batch_size
        * (group * row_tokens if shared is None else shared.prompt + group * shared.completion),
        tokens_per_pass=batch.tokens,
        left_out=tuple(_left_out(config, batch)),
    )


def _shared_prompts(config: RunConfig, row_tokens: int) -> SharedPrompts | None:
    """A micro-batch with completions of maximum length, whole groups first; None for separate rows."""
    model, group = config.model, config.trainer.mapo.num_rollouts_per_prompt
    completion = config.rollout.sampling.max_new_tokens
    # The last token of a prompt comes with each completion.
    prompt = row_tokens - completion - 1
    if not model.shared_prompts or prompt < 1:
        return None
    if model.packed_tokens is None:
        groups, completions = math.ceil(model.micro_batch_size / group), model.micro_batch_size
    else:
        whole, rest = divmod(model.packed_tokens, prompt + group * completion)
        further = max(0, (rest - prompt) // completion)
        groups, completions = whole + (further > 0), whole * group + further
        if completions == 0:
            return None
    return SharedPrompts(groups=groups, completions=completions, prompt=prompt, completion=completion)


def _plan_stage(
    config: RunConfig, batch: MicroBatch, stage: int, row_tokens: int, vocab_size: int, rows: int
) -> StagePlan:
    model = config.model
    static = static_memory(config, stage=stage, vocab_size=vocab_size)
    stages = model.pipeline_model_parallel_size
    replicas = config.trainer.world_size // (model.tensor_model_parallel_size * stages)
    share = math.ceil(model.global_batch_size / replicas / rows)
    under_way = min(stages - stage, share)
    layers = stage_bytes(model, batch, stage) * under_way + recompute_bytes(model, batch, stage)
    return StagePlan(
        static=static,
        activations=layers,
        perception=(perception_bytes(model, batch) or 0) * under_way if stage == 0 else 0,
        logits=sum(logits_bytes(model, batch)) if stage == stages - 1 else 0,
        kv_cache=_kv_cache(config, batch, row_tokens, replicas),
        offloaded=static.weights if model.offload_reference else 0,
    )


def _kv_cache(config: RunConfig, batch: MicroBatch, row_tokens: int, replicas: int) -> int:
    if config.rollout.backend != "megatron":
        return 0
    completions = config.data.train_ds.batch_size * config.trainer.mapo.num_rollouts_per_prompt // replicas
    rows = min(config.rollout.batch_size, completions)
    # Where prompts wait for slots, the cache has room for two completions after a prompt (docs/decisions/0007).
    refills = rows < completions and config.model.expert_model_parallel_size == 1
    tokens = row_tokens + (config.rollout.sampling.max_new_tokens if refills else 0)
    return kv_cache_bytes(config.model, rows=rows, tokens=tokens, width=batch.width)


def _left_out(config: RunConfig, batch: MicroBatch) -> Iterator[str]:
    if perception_bytes(config.model, batch) is None:
        yield f"activations of the trained {config.model.perception.type} encoder: no formula"
    if config.model.precision.fp8 is not None:
        yield "FP8 copies of weights, and what FP8 saves on activations: planned as bf16"
    if config.rollout.backend != "megatron":
        yield f"memory of rollout.backend={config.rollout.backend}, which keeps its own weights, keys and values"


def too_large(plan: Plan, limits: PlanConfig) -> str | None:
    """Why the plan does not fit a GPU, and how to make it smaller; None if it fits."""
    room = limits.gpu_memory_gb - limits.reserved_gb
    stage, worst = max(enumerate(plan.stages), key=lambda pair: pair[1].peak)
    if worst.peak / GB <= room:
        return None
    parts = {
        "activations": (worst.activations + worst.perception, "model.micro_batch_size or recompute"),
        "logits": (worst.logits, "model.micro_batch_size or tensor parallelism"),
        "KV cache": (worst.kv_cache, "rollout.batch_size"),
        "optimizer": (worst.static.optimizer, "more data-parallel ranks, or model.lora"),
        "reference": (worst.static.reference, "model.offload_reference=true, or model.lora"),
        "weights and gradients": (
            worst.static.weights + worst.static.gradients,
            "tensor, pipeline or expert parallelism, or model.lora",
        ),
    }
    name, (size, lever) = max(parts.items(), key=lambda item: item[1][0])
    return (
        f"pipeline stage {stage} needs {worst.peak / GB:.1f} GB, and plan.gpu_memory_gb={limits.gpu_memory_gb:g} less "
        f"plan.reserved_gb={limits.reserved_gb:g} leaves {room:.1f} GB; most goes to {name} ({size / GB:.1f} GB): "
        f"change {lever}"
    )


def as_table(plan: Plan) -> str:
    """The plan as text: one line per part, one column per pipeline stage, in GB of one GPU."""
    lines = {
        "weights": [stage.static.weights for stage in plan.stages],
        "gradients": [stage.static.gradients for stage in plan.stages],
        "optimizer": [stage.static.optimizer for stage in plan.stages],
        "reference": [stage.static.reference for stage in plan.stages],
        "activations (estimate)": [stage.activations for stage in plan.stages],
        "audio encoder (estimate)": [stage.perception for stage in plan.stages],
        "logits": [stage.logits for stage in plan.stages],
        "KV cache (generation)": [stage.kv_cache for stage in plan.stages],
        "offloaded reference": [stage.offloaded for stage in plan.stages],
        "peak": [stage.peak for stage in plan.stages],
    }
    head = f"{'GB of one GPU':<26}" + "".join(f"{f'stage {number}':>12}" for number in range(len(plan.stages)))
    body = [f"{name:<26}" + "".join(f"{size / GB:>12.3f}" for size in sizes) for name, sizes in lines.items()]
    trained = f"{'trained parameters':<26}" + "".join(f"{stage.static.trained:>12,}" for stage in plan.stages)
    tokens = [
        f"tokens per step (at most)  {plan.tokens_per_step:,}",
        f"tokens per micro-batch     {plan.tokens_per_pass:,}",
    ]
    return "\n".join([head, *body, trained, *tokens, *(f"not planned: {text}" for text in plan.left_out)])
