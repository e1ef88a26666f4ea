"""Which attention calls Transformer Engine's fused cuDNN kernels support: pure functions of machine and call.

An unsupported call would fall back to a kernel that keeps the S x S weights, or fail in the middle of a step, so it is
refused at start-up. The rules come from the sources that docs/transformer_engine.md names, for our use: no dropout, no
bias, plain softmax, rows of any length. Where versions differ, the stricter rule applies.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

MASS_WIDTH = 16
"""Value width of the call that measures the mass: one channel is used, and fused kernels need multiples of 8 or 16."""
MINIMUM_TE = (2, 0)
"""Oldest Transformer Engine whose rules are known here; unequal head widths came with 1.10."""

HOPPER = (9, 0)
_AMPERE, _ADA, _BLACKWELL, _BEYOND_BLACKWELL = (8, 0), (8, 9), (10, 0), (11, 0)

Layout = Literal["sbhd", "bshd", "thd"]
Dtype = Literal["bf16", "fp16", "fp32", "fp8"]
Fp8Recipe = Literal["delayed", "tensorwise", "mxfp8"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Hardware and library versions that the rules depend on."""

    chip: tuple[int, int]
    """CUDA compute capability: (8, 0) A100, (8, 9) L40S, (9, 0) H100 and H200, (10, 0) B200, (12, 0) RTX PRO 6000."""
    cudnn: tuple[int, int, int]
    """Version of the cuDNN library that is loaded."""
    te: tuple[int, int]
    """Version of Transformer Engine."""
    deterministic: bool = False
    """Whether Transformer Engine is restricted to deterministic kernels."""


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One kind of causal self-attention call."""

    machine: Machine
    head_dim_qk: int
    """Width of a query and key head."""
    head_dim_v: int
    """Width of a value head."""
    dtype: Dtype = "bf16"
    """What the kernel computes in; `fp8` is FP8 attention, not FP8 linear layers alone."""
    layout: Layout = "sbhd"
    """`thd` is packed rows, with a padding-causal mask; the others are unpacked rows under a causal mask."""
    window: int | None = None
    """Keys to the left that a query sees (sliding window); None means all of them."""
    training: bool = True
    """Whether a backward pass follows."""


def mass_call_case(case: AttentionCase) -> AttentionCase:
    """The second call, which measures the audio mass beside `case`: narrow values, never FP8."""
    return replace(case, head_dim_v=MASS_WIDTH, dtype="bf16" if case.dtype == "fp8" else case.dtype)


def refusals(case: AttentionCase) -> list[str]:
    """Why fused attention does not support `case`, each reason with what to change; empty if it does."""
    head_dims = _fp8_head_dims if case.dtype == "fp8" else _head_dims
    rules = (_versions, _dtype, _packing, _window, _determinism, head_dims)
    return [reason for rule in rules for reason in rule(case)]


def fp8_recipe_refusals(recipe: Fp8Recipe, machine: Machine) -> list[str]:
    """Why linear layers cannot run in FP8 with `recipe` on `machine`; empty if they can."""
    reasons = []
    if machine.chip < _ADA:
        reasons.append(f"FP8 needs compute capability 8.9 or newer, not {_dotted(machine.chip)}; unset fp8")
    if recipe == "mxfp8" and not _BLACKWELL <= machine.chip < _BEYOND_BLACKWELL:
        reasons.append(
            f"fp8_recipe=mxfp8 needs compute capability 10.x, not {_dotted(machine.chip)}; set it to delayed"
        )
    oldest = {"delayed": MINIMUM_TE, "tensorwise": (2, 2), "mxfp8": (2, 1)}[recipe]
    if machine.te < oldest:
        reasons.append(f"fp8_recipe={recipe} needs Transformer Engine {_dotted(oldest)}, not {_dotted(machine.te)}")
    return reasons


def refuse_illegal(cases: Mapping[str, AttentionCase]) -> None:
    """ValueError with every reason if any of the named `cases` (all of one machine) is not supported."""
    refused: dict[str, list[str]] = {}
    for name, case in cases.items():
        for reason in refusals(case):
            refused.setdefault(reason, []).append(name)
    if not refused:
        return
    machine = next(iter(cases.values())).machine
    raise ValueError(
        f"Transformer Engine {_dotted(machine.te)} with cuDNN {_dotted(machine.cudnn)} on compute capability "
        f"{_dotted(machine.chip)} cannot run this attention (docs/transformer_engine.md has the table):\n"
        + "\n".join(f"- {', '.join(names)}: {reason}" for reason, names in refused.items())
    )


def _versions(case: AttentionCase) -> Iterator[str]:
    machine = case.machine
    if machine.te < MINIMUM_TE:
        yield f"needs Transformer Engine {_dotted(MINIMUM_TE)} or newer"
    if machine.chip < _AMPERE:
        yield "needs compute capability 8.0 or newer"
    if machine.cudnn < (9, 0, 0):
        yield "needs cuDNN 9.0 or newer: older versions need rows in multiples of 64 tokens"
    if machine.chip >= _BLACKWELL and machine.cudnn < (9, 7, 0):
        yield "compute capability 10.0 and newer need cuDNN 9.7"
    if machine.cudnn in ((9, 10, 0), (9, 10, 1)):
        yield "cuDNN 9.10.0 and 9.10.1 have faulty attention; use 9.10.2 or newer"


def _dtype(case: AttentionCase) -> Iterator[str]:
    machine = case.machine
    if case.dtype == "fp32":
        yield "fused attention has no float32; set trainer.precision=bf16"
    if case.dtype != "fp8":
        return
    if not HOPPER <= machine.chip < _BEYOND_BLACKWELL:
        yield "FP8 attention needs compute capability 9.0 or 10.x; set fp8_dot_product_attention=false"
    if machine.cudnn < (9, 7, 0):
        yield "FP8 attention needs cuDNN 9.7: older versions need rows in multiples of 128 tokens"


def _packing(case: AttentionCase) -> Iterator[str]:
    if case.layout != "thd":
        return
    if not HOPPER <= case.machine.chip < _BEYOND_BLACKWELL:
        yield "packed rows need compute capability 9.0 or 10.x; unset packed_tokens"
    if case.machine.cudnn < (9, 6, 0):
        yield "packed rows need cuDNN 9.6; unset packed_tokens"
    if case.dtype == "fp8":
        yield "FP8 attention does not support packed rows; unset packed_tokens or set fp8_dot_product_attention=false"


def _window(case: AttentionCase) -> Iterator[str]:
    if case.window is None:
        return
    if case.dtype == "fp8":
        yield "FP8 attention has no sliding window; unset window_size or set fp8_dot_product_attention=false"
    if case.machine.cudnn < (9, 2, 0):
        yield "a sliding window needs cuDNN 9.2"
    if case.layout == "thd" and case.machine.cudnn == (9, 14, 0):
        yield "cuDNN 9.14.0 has no sliding window over packed rows; use another version"


def _determinism(case: AttentionCase) -> Iterator[str]:
    if not (case.training and case.machine.deterministic):
        return
    if case.machine.chip != HOPPER or case.dtype == "fp8":
        yield "a deterministic backward pass needs compute capability 9.0 and no FP8 attention; allow other kernels"


def _head_dims(case: AttentionCase) -> Iterator[str]:
    widths = (case.head_dim_qk, case.head_dim_v)
    if any(width % 8 for width in widths):
        yield f"head widths must be multiples of 8, not {_slashed(widths)}"
    elif not _widths_fit(case):
        needs = "cuDNN 9.5 and Transformer Engine 2.6" if case.training else "cuDNN 9.1"
        yield f"head widths {_slashed(widths)}: above 128, and up to 256, need compute capability 9.0 with {needs}"
    elif _hits_hopper_fault(case):
        yield f"cuDNN 9.11 and newer have no backward pass for unequal head widths {_slashed(widths)} on 9.0"


def _widths_fit(case: AttentionCase) -> bool:
    machine, widest = case.machine, max(case.head_dim_qk, case.head_dim_v)
    if widest <= 128:
        return True
    if machine.chip != HOPPER or widest > 256:
        return False
    return (machine.cudnn >= (9, 5, 0) and machine.te >= (2, 6)) if case.training else machine.cudnn >= (9, 1, 0)


def _hits_hopper_fault(case: AttentionCase) -> bool:
    widths = (case.head_dim_qk, case.head_dim_v)
    return (
        case.training
        and case.machine.chip == HOPPER
        and case.machine.cudnn >= (9, 11, 0)
        and widths[0] != widths[1]
        and min(widths) >= 128
        and widths != (192, 128)
    )


def _fp8_head_dims(case: AttentionCase) -> Iterator[str]:
    widths = (case.head_dim_qk, case.head_dim_v)
    remedy = "set fp8_dot_product_attention=false"
    if any(width % 16 for width in widths):
        yield f"FP8 attention needs head widths in multiples of 16, not {_slashed(widths)}; {remedy}"
    if case.machine.chip >= _BLACKWELL:
        if max(widths) > 128:
            yield f"FP8 attention on 10.x goes up to head width 128, not {_slashed(widths)}; {remedy}"
    elif case.training and widths != (128, 128):
        yield f"FP8 attention on 9.0 trains only at head widths 128/128, not {_slashed(widths)}; {remedy}"
    elif max(widths) > 256:
        yield f"FP8 attention on 9.0 goes up to head width 256, not {_slashed(widths)}; {remedy}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


def _slashed(widths: tuple[int, int]) -> str:
    return f"{widths[0]}/{widths[1]}"
