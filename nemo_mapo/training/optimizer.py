"""The optimiser and its schedule, chosen by config."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from nemo_mapo.config.model import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig, total_steps: int) -> tuple[AdamW, LambdaLR]:
    """AdamW over the trainable parameters, without weight decay on vectors (norms, biases), and its schedule."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return optimizer, LambdaLR(optimizer, _schedule(config, total_steps))


def clip_gradients(model: nn.Module, max_norm: float, step: int) -> float:
    """Clip the global gradient norm in place and return the norm before clipping.

    Raises:
        FloatingPointError: naming the first parameter whose gradient is not finite.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if not torch.isfinite(norm):
        bad = next(
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
        )
        raise FloatingPointError(f"step {step}: the gradient of {bad} is not finite; it was not applied")
    nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return float(norm)


def _schedule(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    sched = config.sched
    floor = sched.min_lr / config.lr

    def factor(step: int) -> float:
        if step < sched.warmup_steps:
            return (step + 1) / sched.warmup_steps
        if sched.name == "constant":
            return 1.0
        progress = (step - sched.warmup_steps) / max(1, total_steps - sched.warmup_steps)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
