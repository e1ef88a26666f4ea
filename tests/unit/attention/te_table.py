"""The table of docs/transformer_engine.md, from the rules themselves: `python tests/unit/attention/te_table.py`."""

from dataclasses import replace
from typing import Any

from nemo_mapo.attention.te_support import MASS_WIDTH, AttentionCase, Machine, refusals

_CHIPS = {"8.0": (8, 0), "8.9": (8, 9), "9.0": (9, 0), "10.0": (10, 0), "12.0": (12, 0)}
_CUDNNS: tuple[tuple[int, int, int], ...] = tuple((9, minor, 2 if minor == 10 else 0) for minor in range(19))
"""Versions that are tried; the faulty 9.10.0 and 9.10.1 are left out."""
_ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("output, 128/128", {}),
    (f"mass, 128/{MASS_WIDTH}", {"head_dim_v": MASS_WIDTH}),
    ("one call for both, 128/136", {"head_dim_v": 136}),
    ("output, 256/256", {"head_dim_qk": 256, "head_dim_v": 256}),
    (f"mass, 256/{MASS_WIDTH}", {"head_dim_qk": 256, "head_dim_v": MASS_WIDTH}),
    ("output, packed", {"layout": "thd"}),
    (f"mass 128/{MASS_WIDTH}, packed", {"layout": "thd", "head_dim_v": MASS_WIDTH}),
    ("output, window", {"window": 512}),
    (f"mass 128/{MASS_WIDTH}, window", {"window": 512, "head_dim_v": MASS_WIDTH}),
    ("output, packed, window", {"layout": "thd", "window": 512}),
    ("FP8 output, 128/128", {"dtype": "fp8"}),
    ("FP8 output, 64/64", {"dtype": "fp8", "head_dim_qk": 64, "head_dim_v": 64}),
    (f"FP8 mass, 128/{MASS_WIDTH} (not used)", {"dtype": "fp8", "head_dim_v": MASS_WIDTH}),
    ("FP8 output, packed", {"dtype": "fp8", "layout": "thd"}),
    ("FP8 output, window", {"dtype": "fp8", "window": 512}),
)


def support_table() -> str:
    """Markdown: for each call and chip the cuDNN versions that take it, forward and with backward."""
    lines = [f"| call | pass | {' | '.join(_CHIPS)} |", "|---|---|" + "---|" * len(_CHIPS)]
    for name, changes in _ROWS:
        for direction, training in (("forward", False), ("backward", True)):
            cells = [_cudnn_range(_case(chip, training, changes)) for chip in _CHIPS.values()]
            lines.append(f"| {name} | {direction} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _case(chip: tuple[int, int], training: bool, changes: dict[str, Any]) -> AttentionCase:
    machine = Machine(chip=chip, cudnn=_CUDNNS[-1], te=(2, 9))
    return replace(AttentionCase(machine=machine, head_dim_qk=128, head_dim_v=128, training=training), **changes)


def _cudnn_range(case: AttentionCase) -> str:
    legal = [cudnn for cudnn in _CUDNNS if not refusals(replace(case, machine=replace(case.machine, cudnn=cudnn)))]
    if not legal:
        return "no"
    between = [cudnn for cudnn in _CUDNNS if legal[0] < cudnn < legal[-1] and cudnn not in legal]
    end = "+" if legal[-1] == _CUDNNS[-1] else f" to {_name(legal[-1])}"
    return _name(legal[0]) + end + "".join(f", not {_name(cudnn)}" for cudnn in between)


def _name(cudnn: tuple[int, int, int]) -> str:
    return ".".join(map(str, cudnn)).removesuffix(".0")


if __name__ == "__main__":
    print(support_table(), end="")
