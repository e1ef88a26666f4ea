"""What the ranks of the planner's tests run; apart, because a rank imports it by name and no test file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.config.plan import PlanConfig
from nemo_mapo.config.run import RunConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import PADDED_ROWS, MicroBatching
from nemo_mapo.models.lora import freeze
from nemo_mapo.platform import install_cpu_host
from nemo_mapo.rows import Prompt, Row, training_rows
from nemo_mapo.training.optimizer import MainWeightAdamW, build_optimizer, wrap_data_parallel
from nemo_mapo.training.plan import (
    Plan,
    StaticMemory,
    buffer_elements,
    data_parallel_ranks,
    make_plan,
    parameter_bytes,
    static_memory,
)
from nemo_mapo.training.plan_activations import (
    MicroBatch,
    SharedPrompts,
    logits_bytes,
    perception_bytes,
    stage_bytes,
)
from nemo_mapo.training.signals import token_signals
from support.layouts import GROUP_SIZE, build, hard_groups
from support.tiny import SAMPLE_RATE, TinyAudioLLM, tiny_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run_config(model: ModelConfig, *, ranks: int, precision: str = "fp32", accelerator: str = "cpu") -> RunConfig:
    """A run of this model."""
    split = {"input_cfg": [{"type": "lhotse", "cuts_path": "cuts.jsonl"}], "batch_size": 4, "sample_rate": SAMPLE_RATE}
    return RunConfig(
        trainer={
            "devices": ranks,
            "precision": precision,
            "accelerator": accelerator,
            "mapo": {"num_rollouts_per_prompt": GROUP_SIZE},
        },
        model=replace(model, micro_batch_size=1),
        rollout={"sampling": {"max_new_tokens": 16}},
        objective=ObjectiveConfig(overlong_buffer=0),
        data={"tokenizer": "none", "train_ds": split, "validation_ds": split},
    )


def of_each(function: Callable[..., Any], models: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """On every rank: the function's result for each model, one layout after the other; starting ranks takes longest."""
    found = {}
    for name, arguments in models.items():
        parallel_state.destroy_model_parallel()
        found[name] = function(*arguments)
    return found


def built_memory(model: ModelConfig, precision: str) -> StaticMemory:
    """On every rank: what is really there when the policy, its buffers and its optimiser are built."""
    policy = build(model, dtype=DTYPES[precision])
    start = parameter_bytes(policy.parameters())
    adapters = 0 if model.lora is None else parameter_bytes([p for p in policy.parameters() if p.requires_grad])
    freeze(policy, model.resolved_freeze)
    wrapped = wrap_data_parallel(policy)
    optimizer = build_optimizer(wrapped, model.optim)
    assert isinstance(optimizer, MainWeightAdamW)
    # A step on zero gradients, so that the moments are there.
    optimizer.zero_grad()
    assert optimizer.step(lr=1e-3, max_norm=1.0).fault is None
    moments = [tensor for state in optimizer.adamw.state.values() for kind, tensor in state.items() if kind != "step"]
    copies = [weight for name, weight in optimizer.main.items() if weight is not optimizer.parameters[name]]
    buffers = wrapped.buffers + wrapped.expert_parallel_buffers
    assert model.lora is None or adapters
    return StaticMemory(
        weights=parameter_bytes(policy.parameters()),
        gradients=sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in buffers),
        optimizer=parameter_bytes([*moments, *copies]),
        reference=start if model.lora is None else 0,
        trained=sum(parameter.numel() for parameter in optimizer.parameters.values()),
    )


def planned_memory(configs: dict[str, RunConfig], vocab_size: int) -> dict[str, list[StaticMemory]]:
    """In one process: for every run the plan of each pipeline stage."""
    with _without_groups():
        return {
            name: [
                static_memory(config, stage=stage, vocab_size=vocab_size)
                for stage in range(config.model.pipeline_model_parallel_size)
            ]
            for name, config in configs.items()
        }


def planned(config: RunConfig, limits: PlanConfig, vocab_size: int) -> Plan:
    """In one process: the whole plan."""
    with _without_groups():
        return make_plan(config, limits, vocab_size=vocab_size)


def padded_buffers(model: ModelConfig, precision: str) -> list[tuple[int, int]]:
    """On every rank: elements of the distributed optimiser's buffers as Megatron makes them, and as planned."""
    policy = build(model, dtype=DTYPES[precision])
    freeze(policy, model.resolved_freeze)
    wrapped = wrap_data_parallel(policy, distributed_optimizer=True)
    found = []
    for buffer in wrapped.buffers + wrapped.expert_parallel_buffers:
        # Megatron lists the parameters of a buffer as the model does.
        replicas = data_parallel_ranks(buffer.params[0])
        found.append((buffer.numel, buffer_elements(buffer.params, replicas=replicas)))
    return found


def activations(model: ModelConfig, precision: str) -> tuple[int, int]:
    """On every rank: bytes that a forward pass of a micro-batch keeps, measured, and as they are planned."""
    policy = build(model, dtype=DTYPES[precision])
    freeze(policy, model.resolved_freeze)
    tiny = TinyAudioLLM(config=model, model=policy, tokenizer=tiny_tokenizer())
    rows = training_rows(hard_groups(tiny))
    with saved_tensors(policy) as saved:
        token_signals(policy, rows, head_reduction="max")
    inputs = PADDED_ROWS.lay_out(rows, policy)
    longest = inputs.tokens.shape[1]
    longest += -longest % model.tensor_model_parallel_size if model.sequence_parallel else 0
    batch = micro_batch(
        policy,
        precision,
        tokens=len(rows) * longest,
        clips=len(inputs.audio.lengths),
        audio_seconds=inputs.audio.waveforms.shape[1] / SAMPLE_RATE,
    )
    return saved.num_bytes, planned_bytes(model, batch)


def shared_activations(model: ModelConfig, precision: str, shared: SharedPrompts) -> tuple[int, int]:
    """On every rank: the same of groups whose prompts, with a clip each, are read once."""
    policy = build(model, dtype=DTYPES[precision])
    freeze(policy, model.resolved_freeze)
    samples, generator = SAMPLE_RATE // 10, torch.Generator().manual_seed(0)
    marks = torch.full((policy.num_audio_tokens(samples),), policy.audio_token_id)
    rows = []
    for group in range(shared.groups):
        text = torch.randint(12, policy.vocab_size, (shared.prompt + 1 - len(marks),), generator=generator)
        clip = torch.randn(samples, generator=generator)
        prompt = Prompt(id=str(group), token_ids=torch.cat([text[:1], marks, text[1:]]), clips=(clip,))
        words = torch.randint(12, policy.vocab_size, (shared.completion,), generator=generator)
        rows += [Row(prompt=prompt, token_ids=words)] * (shared.completions // shared.groups)
    batching = MicroBatching(rows=len(rows), shared_prompts=True)
    with saved_tensors(policy) as saved:
        token_signals(policy, rows, head_reduction="max", batching=batching)
    batch = micro_batch(
        policy,
        precision,
        tokens=shared.tokens,
        shared=shared,
        clips=shared.groups,
        audio_seconds=samples / SAMPLE_RATE,
    )
    return saved.num_bytes, planned_bytes(model, batch)


def micro_batch(policy: AudioLLM, precision: str, **size: Any) -> MicroBatch:
    """What a pass of that policy on a CPU is planned for."""
    return MicroBatch(
        vocab_size=policy.vocab_size, width=DTYPES[precision].itemsize, measures_mass=True, cuda=False, **size
    )


def planned_bytes(model: ModelConfig, batch: MicroBatch) -> int:
    """Of the only pipeline stage, the audio encoder and the logits."""
    encoder = perception_bytes(model, batch)
    assert encoder is not None
    return stage_bytes(model, batch, 0) + encoder + logits_bytes(model, batch)[0]


@dataclass(kw_only=True)
class SavedTensors:
    """Storages that autograd holds, each counted once, without the model's own weights and buffers."""

    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Their size together."""
        return sum(storage.nbytes() for storage in self.storages.values())


@contextmanager
def saved_tensors(model: nn.Module) -> Iterator[SavedTensors]:
    """Collect what autograd saves inside the block."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = SavedTensors()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # Held here, so that no other tensor gets the address.
            saved.storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


class _without_groups:
    """Take the rank's own process group away for a plan, which pretends to have others, and give it back."""

    def __enter__(self) -> None:
        install_cpu_host()
        dist.destroy_process_group()

    def __exit__(self, *_: object) -> None:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
