"""The whole config of a run, and its sections for sampling, rollouts and start weights."""

from dataclasses import replace
from typing import Literal

from nemo_mapo.config.base import config_class
from nemo_mapo.config.data import DataConfig
from nemo_mapo.config.exp_manager import ExpManagerConfig
from nemo_mapo.config.fields import Count, CountOrZero, PathText, Positive, PositiveFraction, Seed, Temperature
from nemo_mapo.config.model import ModelConfig
from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.config.rewards import RewardsConfig
from nemo_mapo.config.rollout import TrtllmConfig, VllmConfig
from nemo_mapo.config.trainer import TrainerConfig
from nemo_mapo.config.warm_start import WarmStartConfig


@config_class
class SamplingConfig:
    """How tokens are sampled."""

    temperature: Temperature = 1.0
    """0 is greedy."""
    top_k: CountOrZero = 0
    """Keep the k most likely tokens; 0 is off."""
    top_p: PositiveFraction = 1.0
    """Keep the smallest set of tokens whose probability reaches this; 1 is off."""
    repetition_penalty: Positive = 1.0
    """Divide (positive) or multiply (negative) the logits of tokens already in the completion; 1 is off."""
    min_new_tokens: CountOrZero = 0
    """The end-of-turn token is not sampled before this many tokens."""
    max_new_tokens: Count = 120
    """Completions are truncated here."""

    def __post_init__(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.max_new_tokens}")

    @property
    def greedy(self) -> "SamplingConfig":
        """The same length limits with greedy decoding."""
        return replace(self, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0)


@config_class
class RolloutConfig:
    """Which engine generates, and how it samples."""

    backend: Literal["megatron", "vllm", "trtllm"] = "megatron"
    """`megatron` samples from the training weights in place, `vllm` from a copy in vLLM servers, `trtllm` from a copy
    in a TensorRT-LLM engine of this process."""
    batch_size: Count = 64
    """Completions generated together."""
    sampling: SamplingConfig = SamplingConfig()
    log_prob_alarm: Positive = 0.1
    """Mean difference between a token's log-prob in the engine and in training, in nats, that triggers a warning."""
    vllm: VllmConfig | None = None
    """The servers of `backend: vllm`."""
    trtllm: TrtllmConfig | None = None
    """The engine of `backend: trtllm`."""

    def __post_init__(self) -> None:
        if self.backend != "megatron" and self.engine is None:
            raise ValueError(
                f"backend={self.backend} needs a section {self.backend}; rollout={self.backend} has one to start from"
            )

    @property
    def engine(self) -> VllmConfig | TrtllmConfig | None:
        """The section of the backend; None for `megatron`, which has none."""
        return {"megatron": None, "vllm": self.vllm, "trtllm": self.trtllm}[self.backend]


@config_class
class PretrainedConfig:
    """Existing weights to start from."""

    restore_from_path: PathText | None = None
    """A nemo-mapo checkpoint directory; it replaces the warm start."""


@config_class
class RunConfig:
    """The whole config of `examples/train_mapo.py`."""

    seed: Seed = 1234
    """Seed of sampling; a row's randomness depends only on seed, step and row."""
    trainer: TrainerConfig = TrainerConfig()
    exp_manager: ExpManagerConfig = ExpManagerConfig()
    pretrained_checkpoint: PretrainedConfig = PretrainedConfig()
    warm_start: WarmStartConfig | None = None
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    data: DataConfig

    def __post_init__(self) -> None:
        completions = self.data.train_ds.batch_size * self.completions_per_prompt
        if completions % self.model.global_batch_size:
            factor = "" if self.supervised else " x trainer.mapo.num_rollouts_per_prompt"
            raise ValueError(
                f"model.global_batch_size={self.model.global_batch_size} must divide the batch: "
                f"data.train_ds.batch_size={self.data.train_ds.batch_size}{factor} = {completions} completions"
            )
        self._check_supervised()
        self._check_ranks()
        self._check_backend()
        self._check_length()
        if self.rewards.tars is not None:
            self.rewards.tars.check(self)
        if self.rollout.engine is not None:
            self.rollout.engine.check(self)
        self.trainer.mapo.generation.check(self)
        self._check_advantages()
        if self.warm_start is not None and self.model.restored_encoder is not None:
            raise ValueError(
                "warm_start trains the whole model from noise, and would not keep the encoder of "
                f"model.perception.restore_from_path={self.model.restored_encoder}: leave one of them out (~warm_start)"
            )
        group = self.completions_per_prompt
        if self.rollout.batch_size < group:
            raise ValueError(
                f"rollout.batch_size={self.rollout.batch_size} must hold a whole group: at least "
                f"trainer.mapo.num_rollouts_per_prompt={group}"
            )
        if self.rollout.sampling.temperature == 0:
            raise ValueError(
                "rollout.sampling.temperature=0 draws the same completion for a whole group, so nothing is learned "
                "from rewards; set it above 0 (evaluation is greedy anyway)"
            )
        if self.objective.overlong_buffer > self.rollout.sampling.max_new_tokens:
            raise ValueError(
                f"objective.overlong_buffer={self.objective.overlong_buffer} must be at most "
                f"rollout.sampling.max_new_tokens={self.rollout.sampling.max_new_tokens}"
            )
        longest = self.model.decoder.max_position_embeddings
        if self.rollout.sampling.max_new_tokens >= longest:
            raise ValueError(
                f"rollout.sampling.max_new_tokens={self.rollout.sampling.max_new_tokens} does not fit the position "
                f"range: it must be below model.decoder.max_position_embeddings={longest}"
            )

    def _check_length(self) -> None:
        """ValueError if the training split and the trainer disagree on when the run ends."""
        split, steps, loop = self.data.train_ds, self.trainer.loop.max_steps, self.trainer.loop_name
        if split.infinite and not split.phases and steps < 0:
            raise ValueError(f"data.train_ds.infinite=true has no epochs; set {loop}.max_steps")
        planned = sum(phase.steps for phase in split.phases)
        if split.phases and steps > planned:
            raise ValueError(
                f"{loop}.max_steps={steps} exceeds the {planned} steps of data.train_ds.phases; lengthen a "
                "phase, or set it to -1 to run them all"
            )

    def _check_supervised(self) -> None:
        """ValueError if supervised training is combined with options that apply to rollouts only."""
        if not self.supervised:
            return
        for name, value, wanted in (
            ("rollout.backend", self.rollout.backend, "megatron"),
            ("rewards.tars", self.rewards.tars, None),
            ("trainer.mapo.generation.type", self.trainer.mapo.generation.type, "synchronous"),
        ):
            if value != wanted:
                raise ValueError(f"trainer.sft samples no rollouts: {name}={value} must be {wanted or 'null'}")
        if self.data.target.form == "template" and self.rewards.template == "mpar2":
            raise ValueError(
                "data.target.form=template cannot produce rewards.template=mpar2 from a manifest: write whole "
                "completions into the manifest's `reasoning` and set data.target.form=verbatim, or use template=think"
            )

    def _check_advantages(self) -> None:
        """ValueError if some completion would have no complete set of rewards to normalise one by one."""
        if self.objective.advantages == "total":
            return
        generation = self.trainer.mapo.generation.type
        others = {
            "rewards.tars": self.rewards.tars is not None,
            f"trainer.mapo.generation.type={generation}": generation == "dynamic_sampling",
            "a reward by a judge, whose verdict may be missing": self.rewards.asks_judge,
        }
        if set_too := [name for name, given in others.items() if given]:
            raise ValueError(
                f"objective.advantages=per_reward is incompatible with {', '.join(set_too)}: set it to total"
            )

    @property
    def resolved_objective(self) -> ObjectiveConfig:
        """`objective` with the importance weight that truncated sampling needs (docs/rollouts.md)."""
        objective, sampling = self.objective, self.rollout.sampling
        truncated = sampling.top_k > 0 or sampling.top_p < 1
        if objective.behaviour_clip is not None or not truncated or objective.ratio == "sequence":
            return objective
        return replace(objective, behaviour_clip=objective.truncation_clip)

    @property
    def ahead(self) -> bool:
        """Whether each rollout batch is generated while the previous one is trained on."""
        return self.trainer.mapo.generation.type == "one_ahead"

    def _check_backend(self) -> None:
        """ValueError if the attention backend does not run on the accelerator."""
        if self.model.attention_backend == "sdpa":
            if self.model.precision.fp8 is not None:
                raise ValueError(
                    f"model.precision.fp8={self.model.precision.fp8} needs model.attention_backend=transformer_engine"
                )
            return
        if (self.trainer.accelerator, self.trainer.precision) != ("gpu", "bf16"):
            raise ValueError(
                "model.attention_backend=transformer_engine needs trainer.accelerator=gpu and trainer.precision=bf16, "
                f"not {self.trainer.accelerator} and {self.trainer.precision}; or set it to sdpa"
            )

    def _check_ranks(self) -> None:
        """ValueError if processes, model layout and batch do not fit together."""
        model, world = self.model, self.trainer.world_size
        per_replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
        if world % per_replica:
            raise ValueError(
                f"trainer.num_nodes x trainer.devices = {world} processes must be a multiple of "
                f"model.tensor_model_parallel_size x model.pipeline_model_parallel_size = {per_replica}"
            )
        replicas = world // per_replica
        if replicas % model.expert_model_parallel_size:
            raise ValueError(
                f"model.expert_model_parallel_size={model.expert_model_parallel_size} must divide the {replicas} "
                "data-parallel ranks"
            )
        if (
            self.trainer.accelerator == "cpu"
            and min(model.tensor_model_parallel_size, model.expert_model_parallel_size) > 1
        ):
            raise ValueError(
                f"model.tensor_model_parallel_size={model.tensor_model_parallel_size} with "
                f"model.expert_model_parallel_size={model.expert_model_parallel_size} exchanges unequal numbers of "
                "tokens, which gloo, the library of trainer.accelerator=cpu, cannot do: set one of them to 1"
            )
        group = self.completions_per_prompt
        if replicas > 1 and model.global_batch_size % (replicas * group):
            raise ValueError(
                f"model.global_batch_size={model.global_batch_size} must be a multiple of {replicas} data-parallel "
                f"ranks x {group} completions per prompt = {replicas * group}: groups stay on one rank"
            )
        if replicas > 1 and model.global_batch_size // replicas % model.micro_batch_size:
            raise ValueError(
                f"model.micro_batch_size={model.micro_batch_size} must divide each of {replicas} data-parallel ranks' "
                f"share of model.global_batch_size={model.global_batch_size}"
            )

    @property
    def supervised(self) -> bool:
        """Whether the run trains on targets instead of rollouts."""
        return self.trainer.sft is not None

    @property
    def completions_per_prompt(self) -> int:
        """Completions that are trained on for each prompt of a batch."""
        return 1 if self.supervised else self.trainer.mapo.num_rollouts_per_prompt

    @property
    def steps_per_generation(self) -> int:
        """Optimiser steps per batch of the training split."""
        return self.data.train_ds.batch_size * self.completions_per_prompt // self.model.global_batch_size
