"""Log-probability and entropy of the predicted distribution, in one chunked pass over the logits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

Block = tuple[slice, slice]


def log_probs_and_entropy(
    logits: Float[Tensor, "batch time vocab"],
    targets: Int[Tensor, "batch time"],
    *,
    chunk_size: int,
    process_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Log-probability of each target and entropy of each distribution, without a float32 copy of the logits.

    log p(y) = z_y - log sum_v e^{z_v};   H = log sum_v e^{z_v} - sum_v p_v z_v   (full vocabulary, temperature 1).

    Both passes work through the positions in a workspace of `chunk_size` rows of vocabulary length. The backward pass
    recomputes the softmax and returns a gradient of the logits' dtype. `logits` may have any memory layout; no
    contiguous copy is made.

    Args:
        logits: next-token logits at the positions that predict the targets. With `process_group`, this rank's shard of
            the vocabulary. An entry of -inf has probability zero; columns that only pad the vocabulary must be -inf.
        targets: ids in the whole vocabulary; padding needs a valid id too.
        chunk_size: rows that the float32 (or float64) workspace holds. The forward pass needs two per position, and
            uses two even if this is 1. On a CPU it is fastest if the workspace fits a core's cache.
        process_group: ranks that hold the shards of the vocabulary, all with the same `targets`. The sums over the
            vocabulary are reduced here (twice, whatever the number of chunks). The gradient of each shard is complete
            without communication, provided that every rank back-propagates the same loss.
        vocab_start: id of this shard's first column.

    Returns:
        Log-probabilities in nats, differentiable in `logits`, and entropies in nats, which carry no gradient; float32,
        or float64 for float64 logits. Where no entry of the vocabulary is finite there is no distribution: the
        log-probability is -inf, the entropy 0 and the gradient 0. NaN logits give NaN, and so does the log-probability
        of a target that none, or more than one, of several shards holds.

    Raises:
        ValueError: shapes that do not match, a chunk size below 1, or a shard offset without a process group.
        RuntimeError: from torch, for a target beyond a vocabulary that is not sharded.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets {tuple(targets.shape)} do not match logits {tuple(logits.shape)} without the last axis"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    if vocab_start != 0 and process_group is None:
        raise ValueError(f"vocab_start={vocab_start} needs the process group that holds the other shards")
    apply: Callable[..., tuple[Tensor, Tensor]] = _LogProbsAndEntropy.apply
    return apply(logits, targets, chunk_size, process_group, vocab_start)


class _LogProbsAndEntropy(torch.autograd.Function):
    """Custom because autograd neither recomputes per chunk nor differentiates through an in-place all-reduce."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        chunk_size: int,
        process_group: dist.ProcessGroup | None,
        vocab_start: int,
    ) -> tuple[Tensor, Tensor]:
        targets = targets.long()
        column, owned = _locate(targets - vocab_start, logits.shape[-1], whole=process_group is None)
        sums = _sum_over_shard(logits, column, owned, chunk_size)
        if process_group is not None:
            sums = _sum_over_ranks(sums, process_group)
        ctx.save_for_backward(logits, targets, sums.peak, sums.exp_sum)
        ctx.chunk_size, ctx.vocab_start, ctx.whole = chunk_size, vocab_start, process_group is None
        impossible = sums.exp_sum == 0
        log_sum = sums.exp_sum.log()
        log_probs = (sums.target_logit - sums.peak - log_sum).masked_fill_(impossible, -torch.inf)
        log_probs.masked_fill_(sums.owners != 1, torch.nan)
        entropy_nats = (log_sum - sums.weighted_sum / sums.exp_sum).masked_fill_(impossible, 0.0)
        ctx.mark_non_differentiable(entropy_nats)
        return log_probs, entropy_nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, _grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, peak, exp_sum = ctx.saved_tensors
        column, owned = _locate(targets - ctx.vocab_start, logits.shape[-1], whole=ctx.whole)
        impossible = exp_sum == 0
        grad_log_probs = grad_log_probs.masked_fill(impossible, 0.0)
        softmax_factor = -grad_log_probs / exp_sum.masked_fill(impossible, 1.0)
        target_grad = grad_log_probs * owned
        grad_logits = torch.empty_like(logits)
        in_place = logits.dtype == peak.dtype
        workspace = rows_workspace(logits, 0 if in_place else ctx.chunk_size, peak.dtype)
        for block in blocks(targets.shape, ctx.chunk_size):
            grad = grad_logits[block] if in_place else rows_like(logits[block], workspace)
            grad.copy_(logits[block]).sub_(peak[block].unsqueeze(-1)).exp_().mul_(softmax_factor[block].unsqueeze(-1))
            grad.scatter_add_(-1, column[block].unsqueeze(-1), target_grad[block].unsqueeze(-1))
            if not in_place:
                grad_logits[block] = grad
        return grad_logits, None, None, None, None


@dataclass(frozen=True, kw_only=True)
class _VocabSums:
    """Sums that give log-probability and entropy of a distribution; with z = logit - peak, each `[batch, time]`."""

    peak: Tensor
    exp_sum: Tensor
    """sum e^z"""
    weighted_sum: Tensor
    """sum e^z z"""
    target_logit: Tensor
    owners: Tensor
    """Number of shards that hold the target; 1 for a valid id."""


def _sum_over_shard(logits: Tensor, column: Tensor, owned: Tensor, chunk_size: int) -> _VocabSums:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # Finite, so that differences from it are not NaN if a whole shard is -inf; halved, so that they do not overflow.
    floor = torch.finfo(dtype).min / 2
    peak, exp_sum, weighted_sum = torch.empty(3, *column.shape, dtype=dtype, device=logits.device)
    positions = max(chunk_size // 2, 1)
    workspaces = [rows_workspace(logits, positions, dtype) for _ in range(2)]
    for block in blocks(column.shape, positions):
        shifted, exp = (rows_like(logits[block], workspace) for workspace in workspaces)
        peak[block] = shifted.copy_(logits[block]).amax(-1).clamp_(min=floor)
        torch.exp(shifted.sub_(peak[block].unsqueeze(-1)), out=exp)
        exp_sum[block] = exp.sum(-1)
        # The NaN of an entry that is -inf, 0 * -inf, counts as its limit 0; any other NaN is in exp_sum too.
        weighted_sum[block] = exp.mul_(shifted).nansum(-1)
    target = logits.gather(-1, column.unsqueeze(-1)).squeeze(-1).to(dtype)
    return _VocabSums(
        peak=peak,
        exp_sum=exp_sum,
        weighted_sum=weighted_sum,
        # Not `target * owned`: 0 * -inf is NaN.
        target_logit=target.masked_fill(~owned, 0.0),
        owners=owned.to(dtype),
    )


def _sum_over_ranks(local: _VocabSums, process_group: dist.ProcessGroup) -> _VocabSums:
    """Shift every shard's sums to the common peak, then add them: e^{z - d} (z - d) for d = peak - local peak."""
    peak = local.peak.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=process_group)
    shift = local.peak - peak
    scale = shift.exp()
    sums = torch.stack(
        [
            local.exp_sum * scale,
            (local.weighted_sum + local.exp_sum * shift) * scale,
            local.target_logit,
            local.owners,
        ]
    )
    dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=process_group)
    exp_sum, weighted_sum, target_logit, owners = sums
    return _VocabSums(peak=peak, exp_sum=exp_sum, weighted_sum=weighted_sum, target_logit=target_logit, owners=owners)


def _locate(shard_targets: Tensor, columns: int, *, whole: bool) -> tuple[Tensor, Tensor]:
    """Column of each target, and whether this shard has it; with a whole vocabulary torch itself rejects a bad id."""
    if whole:
        return shard_targets, torch.ones_like(shard_targets, dtype=torch.bool)
    owned = (shard_targets >= 0) & (shard_targets < columns)
    return shard_targets.masked_fill(~owned, 0), owned


def blocks(shape: torch.Size, chunk_size: int) -> Iterator[Block]:
    """Split `[batch, time]` into blocks of at most `chunk_size` positions, as slices that suit any memory layout."""
    batch, time = shape
    rows = min(batch, chunk_size)
    for first_row in range(0, batch, max(rows, 1)):
        columns = chunk_size // rows
        for first_column in range(0, time, columns):
            yield slice(first_row, first_row + rows), slice(first_column, first_column + columns)


def rows_workspace(logits: Tensor, positions: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised rows of vocabulary length for `positions` positions, or for all if there are fewer.

    One allocation serves all blocks: fresh pages for every block cost a CPU more than the arithmetic.
    """
    return torch.empty(min(positions, logits.shape[:-1].numel()), logits.shape[-1], dtype=dtype, device=logits.device)


def rows_like(block: Tensor, workspace: Tensor) -> Tensor:
    """The workspace's first rows in the shape of a block of logits."""
    return workspace[: block.shape[:-1].numel()].view(block.shape)
