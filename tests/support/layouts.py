"""One MAPO step on the same rollouts from the same checkpoint, in any layout, and how two outcomes differ."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor
from torch import Tensor

from nemo_mapo.config.model import ConvPerceptionConfig, DecoderConfig, ModelConfig, OptimizerConfig
from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import MicroBatching
from nemo_mapo.models.lora import add_lora
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.ranks import data_parallel_prompts
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rows import Completion, Group, Problem, ScoredRow, TokenSignals, training_rows
from nemo_mapo.training.actor import MapoActor
from nemo_mapo.training.checkpoint import load_checkpoint, read_checkpoint, write_checkpoint
from nemo_mapo.training.optimizer import (
    build_optimizer,
    global_gradient_norm,
    gradient_of,
    trainable_parameters,
    wrap_data_parallel,
)
from nemo_mapo.training.references import FrozenReference
from support.tiny import TinyAudioLLM, random_policy, tiny_completion, tiny_problems, tiny_tokenizer

NUM_PROMPTS, GROUP_SIZE = 4, 2
ROWS = NUM_PROMPTS * GROUP_SIZE
LENGTHS = (1, 7, 3, 11, 5, 2, 9, 4)
"""Of the completions; unequal sums on the two halves of the rows, which are the data-parallel ranks' shares.
Micro-batches of four rows are of even width: no layout adds padding, which the balancing loss of experts would see."""
WITHOUT_AUDIO = 2
"""Prompt that has no clip."""
NO_SUBSTANTIVE_TOKEN = 3
"""Row whose gate keeps nothing (T_pos = 0)."""
EQUAL_REWARDS = 2
"""Prompt whose group got one reward throughout: advantage 0."""
OBJECTIVE = ObjectiveConfig(eta=0.5, beta=0.1)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the step is computed; the default is the plain run: one process, padded, nothing recomputed."""

    name: str = "plain"
    ranks: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    """Changes of ModelConfig."""
    decoder: dict[str, Any] = field(default_factory=dict)
    """Changes of DecoderConfig."""
    rows: int = ROWS
    """Rows of a micro-batch."""
    objective: ObjectiveConfig = OBJECTIVE
    old: Literal["given", "read", "own"] = "given"
    """Where log pi_old comes from: the batch, a pass of its own, or the training pass itself."""
    dtype: torch.dtype = torch.float32

    def config(self, base: ModelConfig) -> ModelConfig:
        """`base` in this layout."""
        return replace(base, decoder=replace(base.decoder, **self.decoder), **self.model)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a step gave, as far as one process can tell."""

    loss: float
    metrics: dict[str, float]
    signals_differ: float
    """Largest difference between what the training pass and a pass without gradient read; 0 if none was made."""
    grad_norm: float
    replicas_differ: float
    """Largest difference between two ranks that hold the same weight's gradient."""
    winners: float
    """Share of (layer, query)s with audio whose largest mass is on this rank's heads."""


def dense_config(**decoder: Any) -> ModelConfig:
    """A decoder whose heads and layers two and four ranks can share out; the last two layers are targets."""
    settings: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 8,
        "ffn_hidden_size": 64,
        "max_position_embeddings": 128,
        "init_method_std": 0.2,
    }
    return ModelConfig(
        perception=ConvPerceptionConfig(mel_bins=16, channels=24, downsampling=4),
        decoder=DecoderConfig(**settings | decoder),
        target_layers=(2, 3),
        shared_prompts=False,
        micro_batch_size=1,
        global_batch_size=ROWS,
    )


def moe_config(**decoder: Any) -> ModelConfig:
    """The same with four experts a layer."""
    return dense_config(num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=32, **decoder)


def build(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> AudioLLM:
    """The model of this rank in this layout, with weights of its own."""
    install_cpu_host()
    initialize_parallel(
        tensor=config.tensor_model_parallel_size,
        pipeline=config.pipeline_model_parallel_size,
        expert=config.expert_model_parallel_size,
    )
    model = random_policy(config, tiny_tokenizer(), seed=seed, dtype=dtype)
    if config.lora is not None:
        add_lora(model.language_model, config.lora, seed=seed)
    return model


def write_start(path: str, config: ModelConfig) -> list[ScoredRow]:
    """Save a checkpoint of random weights, written by one process; give rollouts to train on."""
    model = build(config)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            # Fresh adapters change nothing and leave A without gradient.
            torch.nn.init.normal_(parameter, std=0.1)
    write_checkpoint(Path(path), model)
    tiny = TinyAudioLLM(config=config, model=model, tokenizer=tiny_tokenizer())
    return hard_batch(tiny)


def hard_groups(tiny: TinyAudioLLM) -> list[Group]:
    """Completions of random words, one of length 1, one to a prompt without audio."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(10, len(tiny.tokenizer), (ROWS, max(LENGTHS)), generator=generator)
    completions = [tiny_completion(tiny, row[:length]) for row, length in zip(words, LENGTHS, strict=True)]
    return [
        problem.answered(completions[number * GROUP_SIZE : (number + 1) * GROUP_SIZE])
        for number, problem in enumerate(hard_problems(tiny))
    ]


def hard_problems(tiny: TinyAudioLLM) -> list[Problem]:
    """Prompts of unequal length, one without audio."""
    return tiny_problems(tiny, num_prompts=NUM_PROMPTS, without_audio=(WITHOUT_AUDIO,))


def hard_batch(tiny: TinyAudioLLM) -> list[ScoredRow]:
    """Scored rows with the hard cases; the old policy and the references differ from the policy a little."""
    rows = training_rows(hard_groups(tiny))
    special = SpecialTokens.from_tokenizer(tiny.tokenizer)
    reference = FrozenReference(tiny.model, special, keep_placeholders=False, batching=MicroBatching(rows=ROWS))
    generator = torch.Generator().manual_seed(4)
    log_probs = reference.log_probs(rows)

    def near(values: list[Tensor]) -> list[Tensor]:
        noise = 0.3 * torch.randn(ROWS, max(LENGTHS), generator=generator)
        return [row + noise[number, : len(row)] for number, row in enumerate(values)]

    advantages = torch.randn(ROWS, generator=generator)
    advantages[EQUAL_REWARDS * GROUP_SIZE : (EQUAL_REWARDS + 1) * GROUP_SIZE] = 0.0
    gate = torch.rand(ROWS, max(LENGTHS), generator=generator) < 0.6
    gate[NO_SUBSTANTIVE_TOKEN] = False
    old, ref, entropies = near(log_probs), near(log_probs), near(reference.text_entropy(rows))
    right = (torch.rand(ROWS, generator=generator) < 0.5).float()
    return [
        ScoredRow(
            prompt=row.prompt,
            token_ids=row.token_ids,
            old_log_probs=old[number],
            ref_log_probs=ref[number],
            text_ref_entropy_nats=entropies[number].clamp(min=0.0),
            pos_gate=gate[number, : len(row.token_ids)],
            advantages=advantages[number],
            accuracy_rewards=right[number],
            finished=torch.tensor(True),
        )
        for number, row in enumerate(rows)
    ]


def one_step(layout: Layout, base: ModelConfig, start: str, gradients: str, batch: list[ScoredRow]) -> Outcome:
    """On every rank: load the checkpoint, compute the step's loss and gradient, and save the gradient.

    The gradient is saved cut like the weights, so whoever loads it in another layout has it gathered.
    """
    actor = build_actor(layout, base, start)
    share = batch_share(batch)
    if layout.old != "given":
        read = actor.get_inference_signals(share)
        old = [one.log_probs if layout.old == "read" else None for one in read]
        share = [replace(row, old_log_probs=values) for row, values in zip(share, old, strict=True)]
    actor.wrapped.zero_grad_buffer()
    passed = actor.training_pass(share)
    parameters = dict(trainable_parameters(actor.policy))
    _make_folder(gradients)
    dist_checkpointing.save(sharded_gradients(actor.policy), gradients)
    return Outcome(
        loss=passed.loss,
        metrics=passed.metrics,
        signals_differ=0.0 if layout.old == "given" else largest_difference(passed.signals, read),
        grad_norm=float(global_gradient_norm(parameters)),
        replicas_differ=replicas_differ(actor.policy),
        winners=head_winners(actor.policy),
    )


def build_actor(layout: Layout, base: ModelConfig, start: str) -> MapoActor:
    """The policy of this rank, with the checkpoint's weights."""
    config = layout.config(base)
    model = build(config, seed=99, dtype=layout.dtype)
    load_checkpoint(Path(start), model)
    reference = model
    if config.lora is None:
        reference = build(config, seed=98, dtype=layout.dtype)
        load_checkpoint(Path(start), reference)
    tokenizer = tiny_tokenizer()
    batching = replace(MicroBatching.of(config), rows=layout.rows)
    return MapoActor(
        wrap_data_parallel(model.train()),
        MegatronRollout(model, tokenizer, batch_size=ROWS),
        FrozenReference(
            reference,
            SpecialTokens.from_tokenizer(tokenizer),
            keep_placeholders=False,
            batching=batching,
            adapted=config.lora is not None,
        ),
        layout.objective,
        batching,
    )


def batch_share(batch: list[ScoredRow]) -> list[ScoredRow]:
    """This data-parallel rank's rows."""
    prompts = data_parallel_prompts(NUM_PROMPTS, 1)
    return [batch[prompt * GROUP_SIZE + member] for prompt in prompts for member in range(GROUP_SIZE)]


def sharded_gradients(model: AudioLLM) -> dict[str, Any]:
    """The gradient buffers, each cut like its weight."""
    parameters = dict(trainable_parameters(model))
    by_id = get_param_id_to_sharded_param_map(model.sharded_state_dict(), iter(parameters.values()))
    assert len(by_id) == len(parameters)
    return {
        name: make_sharded_optimizer_tensor(by_id[index], gradient_of(parameter), "gradient")
        for index, (name, parameter) in enumerate(parameters.items())
    }


def whole_gradients(base: ModelConfig, folder: str) -> dict[str, Tensor]:
    """In one process: the gradient that `one_step` saved, by parameter."""
    model = build(base)
    wrap_data_parallel(model)
    gradients: dict[str, Tensor] = dist_checkpointing.load(sharded_gradients(model), folder)
    return gradients


def _make_folder(folder: str) -> None:
    if dist.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    dist.barrier()


def largest_difference(one: list[TokenSignals], other: list[TokenSignals]) -> float:
    """Of any signal of any token."""
    names = ("log_probs", "entropy_nats", "audio_mass")
    pairs = [(vars(a)[name], vars(b)[name]) for a, b in zip(one, other, strict=True) for name in names]
    return max(float((a - b).abs().max()) for a, b in pairs)


def replicas_differ(model: AudioLLM) -> float:
    """Largest difference of a gradient between ranks that hold the same weight: only one of them is saved."""
    worst = 0.0
    for _, parameter in trainable_parameters(model):
        groups = []
        if not vars(parameter).get("tensor_model_parallel", False):
            groups.append(parallel_state.get_tensor_model_parallel_group())
        if vars(parameter).get("allreduce", True):
            groups.append(parallel_state.get_data_parallel_group())
        if vars(parameter).get("shared_embedding", False):
            groups.append(parallel_state.get_embedding_group())
        for group in groups:
            gradient = gradient_of(parameter)
            ranks = [torch.empty_like(gradient) for _ in range(group.size())]
            dist.all_gather(ranks, gradient.contiguous(), group=group)
            worst = max(worst, *(float((other - ranks[0]).abs().max()) for other in ranks))
    return worst


def head_winners(model: AudioLLM) -> float:
    """Share of queries that see audio whose largest head is on this rank, in the last forward."""
    if not model.post_process:
        return 0.0
    local = torch.stack(list(model.session.layer_head_masses().values())).detach().amax(2)
    if model.tensor_group is None:
        return 1.0
    ranks = [torch.empty_like(local) for _ in range(model.tensor_group.size())]
    dist.all_gather(ranks, local.contiguous(), group=model.tensor_group)
    largest = torch.stack(ranks).amax(0)
    return float((local == largest)[largest > 0].float().mean())


def relative(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected|, norms over the tensor."""
    return float((value - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny))


def relative_figure(value: float, expected: float, scale: float) -> float:
    """|value - expected| relative to the expected value, or to `scale` if that is larger."""
    return 0.0 if value == expected else abs(value - expected) / max(abs(expected), scale)


def train(layout: Layout, base: ModelConfig, start: str, batch: list[ScoredRow], steps: int, save: str) -> list[float]:
    """On every rank: continue from a checkpoint, with its optimiser state if it has any, and save; the losses."""
    actor = build_actor(layout, base, start)
    optimizer = build_optimizer(actor.wrapped, OptimizerConfig(lr=1e-2, weight_decay=0.01))
    if read_checkpoint(Path(start)).state:
        load_checkpoint(Path(start), actor.policy, optimizer=optimizer)
    share, losses = batch_share(batch), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = actor.get_loss_and_metrics(share, forward_only=False)
        taken = optimizer.step(lr=1e-2, max_norm=1.0)
        assert taken.fault is None
        losses.append(loss)
    write_checkpoint(Path(save), actor.policy, optimizer=optimizer, state={"steps": steps})
    return losses


def generate(layout: Layout, base: ModelConfig, start: str, sampling: SamplingConfig) -> list[list[Completion]]:
    """On every rank: completions of the hard prompts."""
    actor = build_actor(layout, base, start)
    tiny = TinyAudioLLM(config=base, model=actor.policy, tokenizer=tiny_tokenizer())
    prompts = [problem.prompt for problem in hard_problems(tiny)]
    seeds = torch.arange(ROWS)
    completions = actor.rollout.generate(prompts, sampling, group_size=GROUP_SIZE, seeds=seeds)
    assert actor.policy.config.sequence_parallel == layout.config(base).sequence_parallel, "switched back on"
    return completions


def reference_signals(layout: Layout, base: ModelConfig, start: str, batch: list[ScoredRow]) -> tuple[Tensor, ...]:
    """On every rank: log pi_old, the audio mass, log pi_ref and the text reference's entropies of all rows."""
    actor = build_actor(layout, base, start)
    signals = actor.get_inference_signals(batch)
    masses = [one.audio_mass for one in signals if one.audio_mass is not None]
    assert len(masses) == len(batch)
    return (
        torch.cat([one.log_probs for one in signals]),
        torch.cat(masses),
        torch.cat(actor.get_init_policy_logprobs(batch)),
        torch.cat(actor.reference.text_entropy(batch)),
    )
