"""Megatron's sharded linears, with a short way for passes without gradient or tensor parallelism."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


class _ShortWay:
    """Goes around Megatron's autograd functions when they have nothing to do.

    In a decoding step of a small model they cost more than the matrix product.
    """

    weight: Tensor
    bias: Tensor | None
    skip_bias_add: bool
    config: Any

    def forward(
        self, hidden: Float[Tensor, "*tokens in"], *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "*out_tokens out"], Tensor | None]:
        """Output, and the bias that is left to the caller to add; the same numbers either way."""
        if torch.is_grad_enabled() or self.config.tensor_model_parallel_size > 1 or args or kwargs:
            result: tuple[Tensor, Tensor | None] = super().forward(hidden, *args, **kwargs)  # type: ignore[misc]
            return result
        output, bias = F.linear(hidden, self.weight), self.bias
        if bias is None or self.skip_bias_add:
            return output, bias
        return output + bias, None


class ColumnLinear(_ShortWay, ColumnParallelLinear):  # type: ignore[misc]
    """Outputs sharded over the ranks."""


class RowLinear(_ShortWay, RowParallelLinear):  # type: ignore[misc]
    """Inputs sharded over the ranks."""
