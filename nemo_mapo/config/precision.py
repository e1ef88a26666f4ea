"""FP8 in the linear layers (and, if possible, in attention), in Megatron's names."""

import dataclasses
from typing import Any, Literal

from nemo_mapo.config.base import config_class
from nemo_mapo.config.fields import Count, CountOrZero, Flag


@config_class
class PrecisionConfig:
    """FP8 by Transformer Engine; weights and the measurement of the audio mass stay in `trainer.precision`."""

    fp8: Literal["hybrid", "e4m3"] | None = None
    """Format: `hybrid` has e5m2 gradients, `e4m3` is e4m3 throughout; null is no FP8."""
    fp8_recipe: Literal["delayed", "tensorwise", "mxfp8"] = "delayed"
    """How tensors are scaled: by past maxima, by their own maximum, or in blocks of 32 (compute capability 10.x)."""
    fp8_margin: CountOrZero = 0
    """Delayed scaling: the scale is this many powers of two smaller than it could be."""
    fp8_amax_history_len: Count = 1
    """Delayed scaling: number of past maxima to keep."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Delayed scaling: which of the past maxima sets the scale."""
    fp8_wgrad: Flag = True
    """Whether weight gradients are computed in FP8 too (delayed scaling)."""
    fp8_dot_product_attention: Flag = False
    """FP8 attention for the output; only with delayed scaling. docs/transformer_engine.md says where it works."""
    tp_only_amax_red: Flag = False
    """Share maxima only over tensor-parallel ranks, not over data-parallel ones."""
    first_last_layers_bf16: Flag = False
    """Keep the first and the last layers in bfloat16 (not with delayed scaling)."""
    num_layers_at_start_in_bf16: CountOrZero = 1
    """How many of the first layers."""
    num_layers_at_end_in_bf16: CountOrZero = 1
    """How many of the last layers."""

    def __post_init__(self) -> None:
        changed = self.megatron_settings()
        if self.fp8 is None and changed:
            name, value = next(iter(changed.items()))
            raise ValueError(f"{name}={value} has no effect without FP8; set fp8 to hybrid or e4m3")
        if self.fp8_dot_product_attention and self.fp8_recipe != "delayed":
            raise ValueError(
                f"fp8_dot_product_attention=true with fp8_recipe={self.fp8_recipe}: FP8 attention needs delayed "
                "scaling; set fp8_recipe to delayed, or fp8_dot_product_attention to false"
            )
        if self.first_last_layers_bf16 and self.fp8_recipe == "delayed":
            raise ValueError(
                "first_last_layers_bf16=true with fp8_recipe=delayed: delayed scaling covers all layers at once; "
                "set fp8_recipe to tensorwise or mxfp8, or first_last_layers_bf16 to false"
            )

    def megatron_settings(self) -> dict[str, Any]:
        """Arguments for Megatron's TransformerConfig, of the same names.

        Values that are Megatron's defaults are left out, so that releases without an option accept the others.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in dataclasses.asdict(self).items() if value != defaults[name]}
