"""Hidden states of every decoder layer, pooled over chosen positions as the layers run, without storing them all."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from nemo_mapo.models.audio_llm import AudioLLM


@contextmanager
def pooled_hidden_states(
    model: AudioLLM, positions: Bool[Tensor, "batch time"]
) -> Iterator[list[Float[Tensor, "batch hidden"]]]:
    """While active, every layer that runs appends the mean of its output over each row's `positions`.

    A row without positions gives zeros. ValueError for a model with pipeline or sequence parallelism: a rank would see
    only a part.
    """
    if model.config.pipeline_model_parallel_size > 1 or model.config.sequence_parallel:
        raise ValueError(
            "hidden states of all layers need model.pipeline_model_parallel_size=1 and model.sequence_parallel=false"
        )
    pooled: list[Float[Tensor, "batch hidden"]] = []
    weights = positions / positions.sum(1, keepdim=True).clamp(min=1)

    def pool(layer: TransformerLayer, arguments: Any, output: tuple[Tensor, Tensor | None]) -> None:
        hidden = output[0]
        pooled.append(torch.einsum("tbh,bt->bh", hidden.float(), weights.to(hidden.device)))

    layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    handles = [layer.register_forward_hook(pool) for layer in layers]
    try:
        yield pooled
    finally:
        for handle in handles:
            handle.remove()
