"""Time and memory of log-probability + entropy, forward and backward, beside cross-entropy alone (CPU).

    python benchmarks/logprob_entropy.py                                   # 64 and 256 tokens, about a minute
    python benchmarks/logprob_entropy.py --clock cpu --repeats 15 --check  # on a machine that does other work

Arms, each on the same contiguous logits of `[1, tokens, vocab]`:
- cross_entropy: torch's `F.cross_entropy` on the flattened logits in their own dtype, summed over tokens; no entropy.
- plain: log-probability and entropy from one float32 `log_softmax`.
- chunked: `nemo_mapo.objective.logprobs`.

Each round runs all arms once, in rotating order; a ratio is the median over rounds of the arm's time over that of
cross-entropy in the same round, so that slow drift of the machine cancels. Memory is the peak of what torch's allocator
hands out, temporaries inside kernels included: the larger of the forward pass and of the backward pass without the
gradient of the logits. One chunk is chunk size x columns of the shard x 4 bytes. The vocabulary-parallel row is the
larger of two gloo ranks with half the vocabulary each. With --check the exit status is 1 when the chunked arm exceeds
1.4 times cross-entropy, or one chunk and 128 bytes a token for its outputs.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from nemo_mapo.objective.logprobs import log_probs_and_entropy

QWEN_VOCAB = 152_064
RATIO_LIMIT = 1.4
"""Largest median of chunked time over cross-entropy's."""
PER_TOKEN_BYTES = 128
"""Beside the chunk, what the outputs and sums of one token may take: room for 16 numbers of 8 bytes."""
FLOAT32_BYTES = 4
MIB = 2**20
RANKS = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""CPU seconds leave out the time that other processes held the core; meaningful with one thread only."""

Loss = Callable[[Tensor, Tensor, int], Tensor]


def cross_entropy(logits: Tensor, targets: Tensor, _chunk_size: int) -> Tensor:
    """-log p, no entropy."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def plain(logits: Tensor, targets: Tensor, _chunk_size: int) -> Tensor:
    """The way one would write it first."""
    log_p = logits.float().log_softmax(-1)
    with torch.no_grad():
        _entropy_nats = -(log_p.exp() * log_p).sum(-1)
    return -log_p.gather(-1, targets.unsqueeze(-1)).sum()


def chunked(logits: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """The function measured."""
    log_probs, _entropy_nats = log_probs_and_entropy(logits, targets, chunk_size=chunk_size)
    return -log_probs.sum()


ARMS: dict[str, Loss] = {"cross_entropy": cross_entropy, "plain": plain, "chunked": chunked}


def make_case(tokens: int, vocab: int, dtype: str) -> tuple[Tensor, Tensor]:
    """Random logits (a leaf) and targets."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, tokens, vocab, generator=generator).to(DTYPES[dtype]).requires_grad_()
    return logits, torch.randint(0, vocab, (1, tokens), generator=generator)


def forward_and_backward(arm: Loss, logits: Tensor, targets: Tensor, chunk_size: int) -> None:
    """One training pass; its gradient is dropped."""
    torch.autograd.grad(arm(logits, targets, chunk_size), logits)


def paired_seconds(tokens: int, dtype: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each arm in each round, after one unmeasured round."""
    logits, targets = make_case(tokens, args.vocab, dtype)
    clock, names = CLOCKS[args.clock], list(ARMS)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(args.repeats + 1):
        turn = round_index % len(names)
        for name in names[turn:] + names[:turn]:
            start = clock()
            forward_and_backward(ARMS[name], logits, targets, args.chunk_size)
            if round_index > 0:
                seconds[name].append(clock() - start)
    return seconds


def extra_bytes(arm: Loss, logits: Tensor, targets: Tensor, chunk_size: int) -> int:
    """Peak of torch's allocations in the forward pass, or in the backward pass less the gradient of the logits."""
    loss, before, forward_peak = allocated_bytes(lambda: arm(logits, targets, chunk_size))
    _gradient, _, backward_peak = allocated_bytes(lambda: torch.autograd.grad(loss, logits)[0])
    return max(forward_peak, backward_peak - logits.numel() * logits.element_size()) - before


def allocated_bytes(step: Callable[[], Tensor]) -> tuple[Tensor, int, int]:
    """The step's result, and the bytes that torch's CPU allocator has handed out before it and at its peak.

    From the profiler, which sees every block of the allocator, so also what a kernel takes and returns inside.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    counts = [event["args"] for event in events if event["name"] == "[memory]"]
    before = counts[0]["Total Allocated"] - counts[0]["Bytes"]
    return result, before, max(count["Total Allocated"] for count in counts)


def extra_bytes_of_rank(rank: int, tokens: int, dtype: str, folder: str, args: argparse.Namespace) -> int:
    """The chunked arm's extra memory on one of the ranks that share the vocabulary equally."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    logits, targets = make_case(tokens, args.vocab // RANKS, dtype)

    def shard(logits: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
        log_probs, _entropy_nats = log_probs_and_entropy(
            logits,
            targets,
            chunk_size=chunk_size,
            process_group=dist.group.WORLD,
            vocab_start=rank * logits.shape[-1],
        )
        return -log_probs.sum()

    lifted = extra_bytes(shard, logits, targets, args.chunk_size)
    dist.destroy_process_group()
    return lifted


def vocab_parallel_extra_bytes(tokens: int, dtype: str, args: argparse.Namespace) -> int:
    """The larger extra memory of two ranks."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(RANKS, mp_context=get_context("spawn")) as ranks:
        runs = [ranks.submit(extra_bytes_of_rank, rank, tokens, dtype, folder, args) for rank in range(RANKS)]
        return max(run.result() for run in runs)


def report_time(tokens: int, dtype: str, args: argparse.Namespace) -> list[str]:
    """Print times beside cross-entropy; return what exceeds the limit."""
    seconds = paired_seconds(tokens, dtype, args)
    exceeded = []
    for name, own in seconds.items():
        ratios = [arm / base for arm, base in zip(own, seconds["cross_entropy"], strict=True)]
        ratio = statistics.median(ratios)
        print(
            f"{dtype:9} {tokens:>6} {name:24} {1000 * statistics.median(own):>8.0f} ms {ratio:>6.2f}x "
            f"({min(ratios):.2f}..{max(ratios):.2f})",
            flush=True,
        )
        if name == "chunked" and ratio > RATIO_LIMIT:
            exceeded.append(f"time {ratio:.2f} > {RATIO_LIMIT} times cross-entropy, {dtype}, {tokens} tokens")
    return exceeded


def report_memory(tokens: int, dtype: str, args: argparse.Namespace) -> list[str]:
    """Print the extra memory; return what exceeds one chunk."""
    logits, targets = make_case(tokens, args.vocab, dtype)
    whole = {name: extra_bytes(arm, logits, targets, args.chunk_size) for name, arm in ARMS.items()}
    lifted = whole | {"chunked, vocab parallel": vocab_parallel_extra_bytes(tokens, dtype, args)}
    exceeded = []
    for name, extra in lifted.items():
        columns = args.vocab // RANKS if "parallel" in name else args.vocab
        chunk = args.chunk_size * columns * FLOAT32_BYTES
        print(f"{dtype:9} {tokens:>6} {name:24} {extra / MIB:>8.2f} MiB = {extra / chunk:.3f} chunks", flush=True)
        if "chunked" in name and extra > chunk + tokens * PER_TOKEN_BYTES:
            exceeded.append(f"memory {extra / chunk:.3f} chunks > 1 ({name}), {dtype}, {tokens} tokens")
    return exceeded


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256], help="positions")
    parser.add_argument("--vocab", type=int, default=QWEN_VOCAB, help="vocabulary size, even")
    parser.add_argument("--chunk-size", type=int, default=2, help="rows of the vocabulary in the workspace")
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for one thread on a busy machine")
    parser.add_argument("--check", action="store_true", help="exit with status 1 when a limit is exceeded")
    return parser.parse_args()


def main() -> int:
    """Measure and print; the exit status."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {args.threads} thread(s), {args.vocab} ids, chunks of {args.chunk_size} rows; "
        f"forward + backward, medians of {args.repeats} paired rounds, {args.clock} time\n"
        'times x: F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") alone, on logits of the same dtype'
    )
    exceeded = []
    for dtype in DTYPES:
        for tokens in args.tokens:
            exceeded += report_time(tokens, dtype, args) + report_memory(tokens, dtype, args)
    for line in exceeded:
        print(f"over the limit: {line}")
    return 1 if args.check and exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
