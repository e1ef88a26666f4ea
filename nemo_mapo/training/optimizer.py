"""The optimiser, chosen by the machine, behind one small interface; its schedule; gradients of a sharded model."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn
from torch.optim import AdamW

from nemo_mapo.config.model import OptimizerConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.ranks import gather

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OptimizerStep:
    """The outcome of one step; equal on all ranks."""

    grad_norm: float
    """Global norm before clipping."""
    fault: str | None
    """First tensor whose gradient is not finite, in which case nothing was changed; None for a step that was taken."""


@runtime_checkable
class PolicyOptimizer(Protocol):
    """The optimiser interface that the trainer needs."""

    def zero_grad(self) -> None:
        """Forget the gradients."""
        ...

    def step(self, *, lr: float, max_norm: float) -> OptimizerStep:
        """Clip the global gradient norm and update the weights, unless a gradient is not finite."""
        ...

    def sharded_state_dict(self, model_sharded: dict[str, Any], *, loading: bool = False) -> dict[str, Any]:
        """State to save, or to load into, each tensor sharded like its parameter."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what was loaded into `sharded_state_dict(..., loading=True)`."""
        ...


class SkippedSteps:
    """Counts consecutive steps that were skipped because a gradient is not finite, up to a limit."""

    def __init__(self, *, limit: int, key: str) -> None:
        """`key` is the config key of `limit`."""
        self.limit = limit
        self.key = key
        self.in_a_row = 0

    def count(self, taken: OptimizerStep, loss: float, *, step: int) -> None:
        """Record the outcome of an update.

        Raises:
            FloatingPointError: naming the first bad tensor, when the limit is reached.
        """
        if taken.fault is None:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        logger.warning(
            f"step {step}: the gradient of {taken.fault} is not finite (loss {loss:.4g}); the update was skipped"
        )
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"step {step}: {self.in_a_row} updates in a row were skipped because the gradient is not finite, the "
                f"first bad tensor being {taken.fault}; the last checkpoint is from before. Lower the learning rate, "
                f"or raise {self.key}"
            )


def wrap_data_parallel(policy: AudioLLM, *, distributed_optimizer: bool = False) -> DistributedDataParallel:
    """Megatron's data parallelism: float32 gradient buffers, summed over ranks at the end of a step.

    A single process uses it as well, so that there is only one path for gradients.
    """
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer, overlap_grad_reduce=False
    )
    wrapped = DistributedDataParallel(policy.config, settings, policy)
    policy.config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def build_optimizer(policy: DistributedDataParallel, config: OptimizerConfig) -> PolicyOptimizer:
    """torch's AdamW on a CPU, Megatron's distributed optimiser (which refuses CPU tensors) on GPUs."""
    if policy.ddp_config.use_distributed_optimizer:
        return DistributedAdamW(policy, config)
    return MainWeightAdamW(policy, config)


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of the `step`-th optimiser step, counted from 0."""
    sched = config.sched
    if step < sched.warmup_steps:
        return config.lr * (step + 1) / sched.warmup_steps
    if sched.name == "constant":
        return config.lr
    progress = (step - sched.warmup_steps) / max(1, total_steps - sched.warmup_steps)
    floor = sched.min_lr / config.lr
    return config.lr * (floor + (1 - floor) * cosine(progress))


def cosine(progress: float) -> float:
    """From 1 to 0 along half a period while `progress` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class MainWeightAdamW:
    """AdamW on float32 main weights: the model's own if they are float32, otherwise copies.

    Gradients are those of Megatron's buffers (float32). Vectors (norms, biases) have no weight decay
    unless `decay_vectors` is set.
    """

    def __init__(
        self, policy: DistributedDataParallel, config: OptimizerConfig, *, decay_vectors: bool = False
    ) -> None:
        self.policy = policy
        self.parameters = dict(trainable_parameters(policy.module))
        self.main = {name: _main_weight(parameter) for name, parameter in self.parameters.items()}
        weights = self.main.values()
        groups = [
            {"params": [p for p in weights if p.dim() > 1], "weight_decay": config.weight_decay},
            {
                "params": [p for p in weights if p.dim() <= 1],
                "weight_decay": config.weight_decay if decay_vectors else 0.0,
            },
        ]
        self.adamw = AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.policy.zero_grad_buffer()

    def step(self, *, lr: float, max_norm: float) -> OptimizerStep:
        """Clip the global gradient norm and update the weights, unless a gradient is not finite."""
        gradients = {name: gradient_of(parameter) for name, parameter in self.parameters.items()}
        norm = global_gradient_norm(self.parameters)
        if not norm.isfinite():
            return OptimizerStep(grad_norm=float(norm), fault=_first_not_finite(gradients))
        for name, weight in self.main.items():
            weight.grad = gradients[name]
        nn.utils.clip_grads_with_norm_(self.main.values(), max_norm, norm)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad()
        self._copy_to_model()
        return OptimizerStep(grad_norm=float(norm), fault=None)

    def sharded_state_dict(self, model_sharded: dict[str, Any], *, loading: bool = False) -> dict[str, Any]:
        """Both moments and main weights beside the model's, sharded like their parameters; the step count."""
        if loading:
            self._start_state()
        names = list(self.parameters)
        by_id = get_param_id_to_sharded_param_map(model_sharded, iter(self.parameters.values()))
        assert len(by_id) == len(names), "a trainable parameter is missing from the model's sharded state"
        state = {name: self._tensors(name) for name in names}
        sharded = {
            name: {
                kind: make_sharded_optimizer_tensor(by_id[index], tensor, f"optimizer.state.{kind}")
                for kind, tensor in state[name].items()
            }
            for index, name in enumerate(names)
        }
        steps = {float(self.adamw.state[weight]["step"]) for weight in self.main.values() if self.adamw.state[weight]}
        assert len(steps) <= 1, f"parameters were updated unequally often: {sorted(steps)}"
        return {"state": sharded, "step": next(iter(steps), 0.0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what was loaded."""
        for name, weight in self.main.items():
            tensors = state["state"][name]
            if "main_weight" in tensors:
                weight.data.copy_(tensors.pop("main_weight"))
            self.adamw.state[weight] = {"step": torch.tensor(state["step"]), **tensors}
        self._copy_to_model()

    def _tensors(self, name: str) -> dict[str, Tensor]:
        weight = self.main[name]
        moments = {kind: tensor for kind, tensor in self.adamw.state[weight].items() if kind != "step"}
        own = weight is self.parameters[name]
        return moments if own else moments | {"main_weight": weight.data}

    def _start_state(self) -> None:
        """Give AdamW zero moments of the right shapes, so that a checkpoint can be loaded into them."""
        for weight in self.main.values():
            self.adamw.state[weight] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }

    @torch.no_grad()
    def _copy_to_model(self) -> None:
        for name, parameter in self.parameters.items():
            if self.main[name] is not parameter:
                parameter.copy_(self.main[name])


class DistributedAdamW:
    """Megatron's distributed optimiser, whose state is sharded over data-parallel ranks; GPUs only."""

    def __init__(self, policy: DistributedDataParallel, config: OptimizerConfig) -> None:
        from megatron.core.optimizer import OptimizerConfig as MegatronConfig
        from megatron.core.optimizer import get_megatron_optimizer

        self.policy = policy
        narrow = policy.config.params_dtype == torch.bfloat16
        settings = MegatronConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            bf16=narrow,
            params_dtype=policy.config.params_dtype,
            use_distributed_optimizer=True,
            clip_grad=0.0,
        )
        self.optimizer = get_megatron_optimizer(settings, [policy])

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.policy.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, *, lr: float, max_norm: float) -> OptimizerStep:
        """Clip the global gradient norm and update the weights, unless a gradient is not finite."""
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            gradients = {name: gradient_of(parameter) for name, parameter in trainable_parameters(self.policy.module)}
            return OptimizerStep(grad_norm=norm, fault=_first_not_finite(gradients))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for chained in self.optimizer.chained_optimizers:
            chained.config.clip_grad = max_norm
        self.optimizer.step()
        return OptimizerStep(grad_norm=norm, fault=None)

    def sharded_state_dict(self, model_sharded: dict[str, Any], *, loading: bool = False) -> dict[str, Any]:
        """Megatron's own layout of the state."""
        state: dict[str, Any] = self.optimizer.sharded_state_dict(model_sharded, is_loading=loading)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what was loaded."""
        self.optimizer.load_state_dict(state)


def trainable_parameters(policy: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters that are trained."""
    return ((name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient in Megatron's buffer, float32."""
    gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient


def global_gradient_norm(parameters: dict[str, nn.Parameter]) -> Tensor:
    """2-norm of the whole model's gradient, with replicated weights counted once; equal on all ranks."""
    counted = [p for p in parameters.values() if param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p)]
    dense = _norm([gradient_of(p) for p in counted if not is_expert(p)])
    experts = _norm([gradient_of(p) for p in counted if is_expert(p)])
    dense = _norm_over_ranks(dense, parallel_state.get_model_parallel_group())
    experts = _norm_over_ranks(experts, parallel_state.get_expert_tensor_model_pipeline_parallel_group())
    return torch.linalg.vector_norm(torch.stack([dense, experts])) if experts > 0 or experts.isnan() else dense


def _norm(gradients: list[Tensor]) -> Tensor:
    return nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())


def _norm_over_ranks(norm: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() == 1:
        return norm
    squared = norm.square()
    dist.all_reduce(squared, group=group)
    return squared.sqrt()


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether Megatron keeps it out of the dense data-parallel reduction: `allreduce` is False on experts only."""
    return not vars(parameter).get("allreduce", True)


def _first_not_finite(gradients: dict[str, Tensor]) -> str:
    """Name of the first bad gradient on the first rank that has one."""
    mine = next((name for name, gradient in gradients.items() if not gradient.isfinite().all()), None)
    return next((name for name in gather(mine) if name is not None), "the norm, though every gradient is finite")


def _main_weight(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return nn.Parameter(parameter.detach().float())
