"""Supervised steps: the likelihood of given completions, and its gradient."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_mapo.data.sequences import select_rows
from nemo_mapo.models.audio_llm import AudioLLM, AudioLLMOutput
from nemo_mapo.ranks import gather_metrics, gather_over_data_parallel
from nemo_mapo.rollout.deaf import DeafTokens
from nemo_mapo.training.signals import MicroBatching, ModelInputs, deafness, read_signals, token_signals_in_parts
from nemo_mapo.types import Metric, TokenBatch, merge_metrics


def supervised_gradient(
    wrapped: DistributedDataParallel,
    sequences: TokenBatch,
    batching: MicroBatching,
    *,
    deaf: DeafTokens | None = None,
) -> dict[str, float]:
    """Add the gradient of one optimiser step to Megatron's buffers; `sequences` is this data-parallel rank's share.

    The loss is the mean negative log-likelihood, nats, of the completion tokens of the whole step. It excludes prompt
    and padding and does not depend on micro-batches, packing or ranks. Returns `train/loss` and
    `train/target_tokens` of the whole step, on every rank. The tokens of `deaf` are trained without hearing the audio.

        supervised_gradient(wrap_data_parallel(policy), sequences, MicroBatching(rows=8))["train/loss"]
    """
    policy: AudioLLM = wrapped.module
    parts = batching.split(sequences)
    global_tokens = sum(gather_over_data_parallel(int(sequences.completion_lengths.sum())))
    # The schedule divides by the number of micro-batches and data parallelism by its ranks, but our loss is a sum.
    scale = len(parts) * parallel_state.get_data_parallel_world_size()

    def forward_step(
        batches: Iterator[tuple[TokenBatch, DeafTokens | None]], model: DistributedDataParallel
    ) -> tuple[Any, Any]:
        sequences, deaf = next(batches)
        part = sequences.to(policy.device)
        inputs = batching.lay_out(part)
        called = model if deaf is None else partial(model, deaf=deafness(deaf, inputs, part, policy))
        output = inputs.call(called, None)
        return output, partial(loss_of, part=part, inputs=inputs)

    def loss_of(output: AudioLLMOutput, *, part: TokenBatch, inputs: ModelInputs) -> tuple[Tensor, dict[str, Metric]]:
        log_probs = read_signals(policy, output, inputs, part).log_probs
        loss = -log_probs.sum() / global_tokens
        tokens = part.completion_lengths.sum()
        return loss * scale, {"train/loss": Metric(total=-log_probs.detach().sum(), weight=tokens)}

    metrics: list[dict[str, Metric]] = get_forward_backward_func()(
        forward_step_func=forward_step,
        # A batch that fits one pass stays unchanged: the last bits depend on which clips are encoded together.
        data_iterator=iter([(sequences, deaf)])
        if len(parts) == 1
        else ((select_rows(sequences, rows), None if deaf is None else deaf.of(rows)) for rows in parts),
        model=[wrapped],
        num_microbatches=len(parts),
        # Both are exchanged with the hidden states, because padding ends at the longest row.
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    return merge_metrics(gather_metrics(metrics)) | {"train/target_tokens": float(global_tokens)}


@torch.no_grad()
def mean_negative_log_likelihood(policy: AudioLLM, batches: Iterable[TokenBatch], batching: MicroBatching) -> float:
    """Nats per completion token over the batches of all data-parallel ranks."""
    total, tokens = 0.0, 0
    for sequences in batches:
        signals = token_signals_in_parts(policy, sequences, head_reduction=None, batching=batching)
        total -= float(signals.log_probs.double().sum())
        tokens += int(sequences.completion_lengths.sum())
    parts = gather_over_data_parallel((total, tokens))
    return sum(total for total, _ in parts) / sum(tokens for _, tokens in parts)
