"""Divergence of two predicted distributions, in one chunked pass over both logits (ours, not the paper's).

A differential entropy cannot see a change of mode at equal entropy: a policy that is certain of "yes" with the audio
and of "no" without it has Delta h = 0. A divergence of the full distributions can.
"""

from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from nemo_mapo.objective.logprobs import blocks, rows_like, rows_workspace

Divergence = Literal["kl", "jsd"]


@torch.no_grad()
def divergence(
    heard: Float[Tensor, "batch time vocab"],
    unheard: Float[Tensor, "batch time vocab"],
    *,
    kind: Divergence,
    chunk_size: int,
    process_group: dist.ProcessGroup | None = None,
) -> Float[Tensor, "batch time"]:
    """Divergence of the distribution with the audio from that without it, in nats, over the full vocabulary.

    kl: sum_v p_v log(p_v / q_v);  jsd: (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, which is at most ln 2.
    p is `heard`, q is `unheard`. Carries no gradient: every weight built on it is detached.

        divergence(policy_logits, text_logits, kind="kl", chunk_size=1)

    Args:
        heard: logits at the positions that predict the tokens, of any floating dtype and memory layout. With
            `process_group`, this rank's shard of the vocabulary. -inf means probability zero.
        unheard: the same without the audio.
        kind: which divergence.
        chunk_size: positions upcast at a time, in each of the two; no float32 copy of all logits is made.
        process_group: ranks that hold the shards of the vocabulary; the result is the same on all of them.

    Returns:
        float32, or float64 for float64 logits; at least 0 up to rounding. inf if p has mass where q has none (kl). NaN
        where either is not a distribution.

    Raises:
        ValueError: shapes that differ, or a chunk size below 1.
    """
    if heard.shape != unheard.shape:
        raise ValueError(f"heard {tuple(heard.shape)} and unheard {tuple(unheard.shape)} must have the same shape")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    dtype = torch.float64 if heard.dtype == torch.float64 else torch.float32
    first, second = (_log_sum_exp(logits, chunk_size, dtype, process_group) for logits in (heard, unheard))
    found = torch.empty(heard.shape[:-1], dtype=dtype, device=heard.device)
    spaces = [rows_workspace(heard, chunk_size, dtype) for _ in range(2)]
    for block in blocks(found.shape, chunk_size):
        log_p, log_q = (rows_like(heard[block], space) for space in spaces)
        log_p.copy_(heard[block]).sub_(first[block].unsqueeze(-1))
        log_q.copy_(unheard[block]).sub_(second[block].unsqueeze(-1))
        found[block] = _over_shard(log_p, log_q, kind)
    if process_group is not None:
        dist.all_reduce(found, group=process_group)
    return found


def _over_shard(log_p: Tensor, log_q: Tensor, kind: Divergence) -> Tensor:
    """This shard's part of the sum; entries with probability 0 add 0."""
    if kind == "kl":
        return _expected(log_p, log_p - log_q)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(log_p.new_tensor(2.0))
    return 0.5 * (_expected(log_p, log_p - log_m) + _expected(log_q, log_q - log_m))


def _expected(log_weight: Tensor, values: Tensor) -> Tensor:
    # -inf minus -inf is NaN where both have probability 0; a NaN from broken logits must stay NaN.
    return (log_weight.exp() * values.masked_fill(log_weight == -torch.inf, 0.0)).sum(-1)


def _log_sum_exp(
    logits: Tensor, chunk_size: int, dtype: torch.dtype, process_group: dist.ProcessGroup | None
) -> Float[Tensor, "batch time"]:
    found = torch.empty(logits.shape[:-1], dtype=dtype, device=logits.device)
    space = rows_workspace(logits, chunk_size, dtype)
    for block in blocks(found.shape, chunk_size):
        found[block] = rows_like(logits[block], space).copy_(logits[block]).logsumexp(-1)
    if process_group is None:
        return found
    peak = found.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=process_group)
    total = (found - peak).exp()
    dist.all_reduce(total, group=process_group)
    return peak + total.log()
