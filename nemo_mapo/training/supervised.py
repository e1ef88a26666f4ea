"""Supervised steps: the likelihood of given completions, and its gradient."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_mapo.models.audio_llm import AudioLLM, AudioLLMOutput
from nemo_mapo.models.layout import MicroBatching, ModelInputs, padded
from nemo_mapo.ranks import gather_metrics, gather_over_data_parallel
from nemo_mapo.rollout.deaf import DeafTokens
from nemo_mapo.rows import Row
from nemo_mapo.training.signals import deafness, read_signals, token_signals_in_parts
from nemo_mapo.types import Metric, merge_metrics


def supervised_gradient(
    wrapped: DistributedDataParallel,
    rows: Sequence[Row],
    batching: MicroBatching,
    *,
    deaf: DeafTokens | None = None,
) -> dict[str, float]:
    """Add the gradient of one optimiser step to Megatron's buffers; `rows` is this data-parallel rank's share.

    The loss is the mean negative log-likelihood, nats, of the completion tokens of the whole step. It excludes prompt
    and padding and does not depend on micro-batches, packing or ranks. Returns `train/loss` and
    `train/target_tokens` of the whole step, on every rank. The tokens of `deaf` are trained without hearing the audio.

        supervised_gradient(wrap_data_parallel(policy), rows, MicroBatching(rows=8))["train/loss"]
    """
    policy: AudioLLM = wrapped.module
    parts = batching.split(rows)
    global_tokens = sum(gather_over_data_parallel(sum(len(row.token_ids) for row in rows)))
    # The schedule divides by the number of micro-batches and data parallelism by its ranks, but our loss is a sum.
    scale = len(parts) * parallel_state.get_data_parallel_world_size()

    def forward_step(batches: Iterator[list[int]], model: DistributedDataParallel) -> tuple[Any, Any]:
        numbers = next(batches)
        inputs = batching.lay_out([rows[number] for number in numbers], policy)
        called = model if deaf is None else partial(model, deaf=deafness(deaf.of(numbers), inputs, policy))
        output = inputs.call(called, None)
        return output, partial(loss_of, inputs=inputs)

    def loss_of(output: AudioLLMOutput, *, inputs: ModelInputs) -> tuple[Tensor, dict[str, Metric]]:
        log_probs = [one.log_probs for one in read_signals(policy, output, inputs)]
        total = -padded(log_probs).sum()
        tokens = torch.tensor(sum(map(len, log_probs)), device=total.device)
        return total / global_tokens * scale, {"train/loss": Metric(total=total.detach(), weight=tokens)}

    metrics: list[dict[str, Metric]] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(parts),
        model=[wrapped],
        num_microbatches=len(parts),
        # Both are exchanged with the hidden states, because padding ends at the longest row.
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    return merge_metrics(gather_metrics(metrics)) | {"train/target_tokens": float(global_tokens)}


@torch.no_grad()
def mean_negative_log_likelihood(policy: AudioLLM, batches: Iterable[Sequence[Row]], batching: MicroBatching) -> float:
    """Nats per completion token over the batches of all data-parallel ranks."""
    total, tokens = 0.0, 0
    for rows in batches:
        for one in token_signals_in_parts(policy, rows, head_reduction=None, batching=batching):
            total -= float(one.log_probs.double().sum())
            tokens += len(one.log_probs)
    parts = gather_over_data_parallel((total, tokens))
    return sum(total for total, _ in parts) / sum(tokens for _, tokens in parts)
