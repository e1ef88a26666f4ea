"""Time and memory of log-probability + entropy, forward and backward, beside cross-entropy alone (CPU).

    python benchmarks/logprob_entropy.py [--tokens 256] [--vocab 152064] [--chunk-size 16] [--repeats 5]

Methods: `cross_entropy` is torch's loss, which gives no entropy; `plain` is log-probability and entropy from one
float32 `log_softmax`; `chunked` is `nemo_mapo.objective.logprobs`. Times are compared within a round (all methods one
after the other), and the ratio is the median over rounds. Memory is what the peak resident size of a fresh process
grows by (Linux only), the gradient of the logits included.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from nemo_mapo.objective.logprobs import log_probs_and_entropy

QWEN_VOCAB = 152_064
WARM_UP_TOKENS = 2
KIB_PER_MIB = 1024
BYTES_PER_MIB = 1024**2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cross_entropy(logits: Tensor, targets: Tensor, _chunk_size: int) -> Tensor:
    """-log p, no entropy."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")


def plain(logits: Tensor, targets: Tensor, _chunk_size: int) -> Tensor:
    """The way one would write it first."""
    log_p = logits.float().log_softmax(-1)
    with torch.no_grad():
        _entropy_nats = -(log_p.exp() * log_p).sum(-1)
    return -log_p.gather(-1, targets.unsqueeze(-1))


def chunked(logits: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """The function measured."""
    log_probs, _entropy_nats = log_probs_and_entropy(logits, targets, chunk_size=chunk_size)
    return -log_probs


METHODS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "cross_entropy": cross_entropy,
    "plain": plain,
    "chunked": chunked,
}


def make_case(args: argparse.Namespace, dtype: str) -> tuple[Tensor, Tensor]:
    """Random logits (a leaf) and targets, two rows."""
    shape = (2, args.tokens // 2)
    logits = torch.empty(*shape, args.vocab, dtype=DTYPES[dtype]).normal_().requires_grad_()
    return logits, torch.randint(0, args.vocab, shape)


def forward_backward(method: str, logits: Tensor, targets: Tensor, chunk_size: int) -> float:
    """Seconds of one forward and backward pass."""
    logits.grad = None
    start = time.perf_counter()
    METHODS[method](logits, targets, chunk_size).sum().backward()
    return time.perf_counter() - start


def extra_memory_mib(method: str, args: argparse.Namespace, dtype: str) -> float:
    """Growth of this process's peak resident size over one pass."""
    torch.set_num_threads(args.threads)
    logits, targets = make_case(args, dtype)
    few = logits.detach()[:, :WARM_UP_TOKENS].clone().requires_grad_()
    forward_backward(method, few, targets[:, :WARM_UP_TOKENS], args.chunk_size)
    before = peak_resident_kib()
    forward_backward(method, logits, targets, args.chunk_size)
    return (peak_resident_kib() - before) / KIB_PER_MIB


def peak_resident_kib() -> int:
    """High-water mark of this process; `getrusage` will not do, a child inherits its parent's figure there."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0])


def measure(args: argparse.Namespace, dtype: str) -> None:
    """Print the rows of one dtype."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh_process:
        memory = {name: fresh_process.submit(extra_memory_mib, name, args, dtype).result() for name in METHODS}
    logits, targets = make_case(args, dtype)
    for name in METHODS:
        forward_backward(name, logits, targets, args.chunk_size)
    rounds = [
        {name: forward_backward(name, logits, targets, args.chunk_size) for name in METHODS}
        for _ in range(args.repeats)
    ]
    logits_mib = logits.numel() * logits.element_size() / BYTES_PER_MIB
    for name in METHODS:
        milliseconds = 1000 * statistics.median(seconds[name] for seconds in rounds)
        ratio = statistics.median(seconds[name] / seconds["cross_entropy"] for seconds in rounds)
        print(
            f"{dtype:9} {name:14} {milliseconds:8.0f} ms {ratio:6.2f}x {memory[name]:8.0f} MiB "
            f"{memory[name] / logits_mib:6.2f}x logits"
        )


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="positions, over two rows (default 256)")
    parser.add_argument("--vocab", type=int, default=QWEN_VOCAB, help=f"vocabulary size (default {QWEN_VOCAB})")
    parser.add_argument("--chunk-size", type=int, default=16, help="positions upcast together (default 16)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.tokens} tokens x {args.vocab} ids, chunks of {args.chunk_size}, {args.threads} thread(s)")
    print(f"{'dtype':9} {'method':14} {'time':>11} {'ratio':>7} {'extra memory':>12}")
    for dtype in DTYPES:
        measure(args, dtype)


if __name__ == "__main__":
    main()
