"""What the audio mass costs: attention forward + backward with it, without it, and with the dense S x S mass.

    python benchmarks/attention_mass.py                     # 2k and 4k tokens, time and memory
    python benchmarks/attention_mass.py --dims 128 --kv-heads 8 --threads 2 --repeats 9

Each round runs all arms once, in rotating order, on the same tensors; a ratio is the median over rounds of the arm's
time over plain attention's time in the same round, so that slow drift of the machine cancels. Memory is how far one
forward and backward lifts the peak resident memory of a fresh process above its inputs (Linux; `--memory-tokens` with
no number skips it). With --check the exit status is 1 when a median ratio exceeds its limit or memory grows faster than
length.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from nemo_mapo.attention import dense_audio_attention_mass
from nemo_mapo.attention.mass import attention_with_audio_mass, attention_without_mass

RATIO_LIMITS = {2048: 1.3, 4096: 1.2}
"""Largest median of time with mass over time without, by tokens."""
LINEAR_GROWTH_LIMIT = 1.1
"""Memory may grow this much faster than length before it counts as more than linear."""
AUDIO_SHARE = 0.4
"""Audio's share of the keys; it changes no cost."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP_TOKENS = 64
RESET_PEAK_RSS = "5"
"""What Linux wants written to /proc/self/clear_refs to restart VmHWM, the peak resident memory (proc(5))."""
KIB = 2**10
MIB = 2**20

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""CPU seconds leave out the time that other processes held the core; meaningful with one thread only."""

Arm = Callable[["AttentionInputs"], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """One sample's projections, as leaves that collect gradients, and the output's gradient."""

    query: Tensor
    key: Tensor
    value: Tensor
    audio_key_mask: Tensor
    output_gradient: Tensor
    segment_ids: Tensor | None


def make_inputs(tokens: int, dim: int, args: argparse.Namespace) -> AttentionInputs:
    """Random projections of one row; with `--segments n` the row packs n samples of equal length."""
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, dim, generator=generator).to(DTYPES[args.dtype])

    segment_ids = 1 + torch.arange(tokens)[None] * args.segments // tokens
    return AttentionInputs(
        query=normal(args.heads).requires_grad_(),
        key=normal(args.kv_heads).requires_grad_(),
        value=normal(args.kv_heads).requires_grad_(),
        audio_key_mask=torch.rand(1, tokens, generator=generator) < AUDIO_SHARE,
        output_gradient=normal(args.heads),
        segment_ids=segment_ids if args.segments > 1 else None,
    )


def plain(inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
    """Attention with nothing captured."""
    return attention_without_mass(inputs.query, inputs.key, inputs.value, segment_ids=inputs.segment_ids), None


def with_mass(inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
    """Attention with the mass from the same kernel call."""
    return attention_with_audio_mass(
        inputs.query, inputs.key, inputs.value, inputs.audio_key_mask, segment_ids=inputs.segment_ids
    )


def dense(inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
    """Attention as usual, and the mass from S x S weights computed beside it."""
    output, _ = plain(inputs)
    mass = dense_audio_attention_mass(inputs.query, inputs.key, inputs.audio_key_mask, segment_ids=inputs.segment_ids)
    return output, mass


ARMS: dict[str, Arm] = {"plain": plain, "mass": with_mass, "dense": dense}


def forward_and_backward(arm: Arm, inputs: AttentionInputs) -> None:
    """One training pass; every row's mass enters the loss."""
    output, mass = arm(inputs)
    leaves = (inputs.query, inputs.key, inputs.value)
    if mass is None:
        torch.autograd.grad(output, leaves, inputs.output_gradient)
    else:
        torch.autograd.grad((output, mass), leaves, (inputs.output_gradient, torch.ones_like(mass)))


def paired_seconds(
    arms: dict[str, Arm], inputs: AttentionInputs, repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each arm in each round, after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for round_index in range(repeats + 1):
        turn = round_index % len(names)
        for name in names[turn:] + names[:turn]:
            start = clock()
            forward_and_backward(arms[name], inputs)
            if round_index > 0:
                seconds[name].append(clock() - start)
    return seconds


def paired_ratios(seconds: dict[str, list[float]], name: str) -> list[float]:
    """The arm's time over plain attention's, round by round."""
    return [arm / base for arm, base in zip(seconds[name], seconds["plain"], strict=True)]


def peak_bytes(name: str, tokens: int, dim: int, args: argparse.Namespace) -> int:
    """How far one forward + backward lifts the resident memory of a fresh process above its inputs (Linux)."""
    with get_context("spawn").Pool(processes=1) as fresh:
        return fresh.apply(_lifted_bytes, (name, tokens, dim, args))


def _lifted_bytes(name: str, tokens: int, dim: int, args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    # What torch loads and caches on its first call is not part of the measurement.
    forward_and_backward(ARMS[name], make_inputs(WARM_UP_TOKENS, dim, args))
    inputs = make_inputs(tokens, dim, args)
    Path("/proc/self/clear_refs").write_text(RESET_PEAK_RSS)
    before = _status_bytes("VmRSS")
    forward_and_backward(ARMS[name], inputs)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    """A memory field of /proc/self/status, which counts in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * KIB


def report_time(args: argparse.Namespace) -> list[str]:
    """Print the table of times; return what exceeds its limit."""
    exceeded = []
    print(
        f"\n{'tokens':>7} {'dim':>4} {'plain ms':>9} {'mass ms':>9} "
        f"{'mass/plain':>11} {'range':>13} {'dense/plain':>11}"
    )
    for dim in args.dims:
        for tokens in args.tokens:
            arms = {name: arm for name, arm in ARMS.items() if name != "dense" or tokens <= args.dense_tokens}
            seconds = paired_seconds(arms, make_inputs(tokens, dim, args), args.repeats, CLOCKS[args.clock])
            ratios = paired_ratios(seconds, "mass")
            ratio = statistics.median(ratios)
            dense_ratio = f"{statistics.median(paired_ratios(seconds, 'dense')):.2f}" if "dense" in arms else "-"
            plain_ms, mass_ms = (1000 * statistics.median(seconds[name]) for name in ("plain", "mass"))
            spread = f"{min(ratios):.2f}..{max(ratios):.2f}"
            print(
                f"{tokens:>7} {dim:>4} {plain_ms:>9.0f} {mass_ms:>9.0f} {ratio:>11.3f} {spread:>13} {dense_ratio:>11}",
                flush=True,
            )
            if ratio > RATIO_LIMITS.get(tokens, float("inf")):
                exceeded.append(f"mass/plain {ratio:.3f} > {RATIO_LIMITS[tokens]} at {tokens} tokens, dim {dim}")
    return exceeded


def report_memory(args: argparse.Namespace) -> list[str]:
    """Print the table of peak memory; return what grows faster than length."""
    exceeded = []
    print(f"\n{'tokens':>7} {'dim':>4} {'plain MiB':>10} {'mass MiB':>10} {'mass KiB/token':>15} {'dense MiB':>10}")
    for dim in args.dims:
        peaks: dict[int, int] = {}
        for tokens in args.memory_tokens:
            peaks[tokens] = peak_bytes("mass", tokens, dim, args)
            plain_mib = peak_bytes("plain", tokens, dim, args) / MIB
            dense_mib = f"{peak_bytes('dense', tokens, dim, args) / MIB:.0f}" if tokens <= args.dense_tokens else "-"
            mass_mib, kib_per_token = peaks[tokens] / MIB, peaks[tokens] / tokens / KIB
            print(
                f"{tokens:>7} {dim:>4} {plain_mib:>10.1f} {mass_mib:>10.1f} {kib_per_token:>15.2f} {dense_mib:>10}",
                flush=True,
            )
        for (short, low), (long, high) in pairwise(sorted(peaks.items())):
            if high / low > LINEAR_GROWTH_LIMIT * long / short:
                exceeded.append(f"memory grows {high / low:.2f}-fold from {short} to {long} tokens, dim {dim}")
    return exceeded


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096], help="lengths to time")
    parser.add_argument("--memory-tokens", type=int, nargs="*", default=[2048, 4096, 8192], help="lengths to weigh")
    parser.add_argument("--dense-tokens", type=int, default=4096, help="longest length at which the dense way runs")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128], help="head widths")
    parser.add_argument("--heads", type=int, default=8, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=2, help="key heads")
    parser.add_argument("--segments", type=int, default=1, help="samples packed into the row")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for one thread on a busy machine")
    parser.add_argument("--check", action="store_true", help="exit with status 1 when a limit is exceeded")
    return parser.parse_args()


def main() -> int:
    """Measure and print; the exit status."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {args.threads} thread(s), {args.dtype}, {args.heads} heads, "
        f"{args.kv_heads} key heads, {args.segments} segment(s); "
        f"forward + backward, medians of {args.repeats} paired rounds, {args.clock} time"
    )
    exceeded = report_time(args) + (report_memory(args) if args.memory_tokens else [])
    for line in exceeded:
        print(f"over the limit: {line}")
    return 1 if args.check and exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
