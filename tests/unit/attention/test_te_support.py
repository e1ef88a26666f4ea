"""Which attention calls Transformer Engine is asked for, and which are refused before the first step and why."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from unit.attention.te_table import support_table

from nemo_mapo.attention.te_support import (
    AttentionCase,
    Machine,
    fp8_recipe_refusals,
    mass_call_case,
    refusals,
    refuse_illegal,
)

DOC = Path(__file__).parents[3] / "docs" / "transformer_engine.md"
A100, L40S, H100, B200, RTX_PRO = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
CHIPS = [(7, 5), A100, L40S, H100, B200, RTX_PRO]
CUDNNS = [(8, 9, 7), *((9, minor, patch) for minor in range(19) for patch in (0, 1, 2))]


def case(
    chip: tuple[int, int] = H100,
    cudnn: tuple[int, int, int] = (9, 13, 0),
    te: tuple[int, int] = (2, 9),
    deterministic: bool = False,
    **changes: Any,
) -> AttentionCase:
    """Bfloat16 training at head width 128 on unpacked rows, unless said otherwise."""
    machine = Machine(chip=chip, cudnn=cudnn, te=te, deterministic=deterministic)
    return replace(AttentionCase(machine=machine, head_dim_qk=128, head_dim_v=128), **changes)


def all_cases() -> list[AttentionCase]:
    return [
        case(chip, cudnn, te, deterministic, dtype=dtype, layout=layout, window=window, head_dim_qk=qk, head_dim_v=v)
        for chip, cudnn, te, deterministic, dtype, layout, window, (qk, v) in product(
            CHIPS,
            [(8, 9, 7), (9, 0, 0), (9, 5, 0), (9, 7, 0), (9, 10, 1), (9, 14, 0), (9, 18, 0)],
            [(1, 13), (2, 0), (2, 9)],
            [False, True],
            ["bf16", "fp8", "fp32"],
            ["sbhd", "thd"],
            [None, 512],
            [(64, 64), (128, 16), (128, 128), (128, 136), (256, 256), (100, 100)],
        )
    ]


@pytest.mark.parametrize(
    "legal",
    [
        case(A100, cudnn=(9, 1, 0)),
        case(L40S, cudnn=(9, 0, 0)),
        case(B200, cudnn=(9, 7, 0)),
        case(RTX_PRO, cudnn=(9, 7, 0)),
        case(head_dim_qk=64, head_dim_v=64),
        case(dtype="fp16"),
        case(head_dim_qk=256, head_dim_v=256, cudnn=(9, 5, 0)),
        case(head_dim_v=136, cudnn=(9, 10, 2)),
        case(layout="thd", cudnn=(9, 6, 0)),
        case(B200, layout="thd"),
        case(window=512, cudnn=(9, 2, 0)),
        case(layout="thd", window=512),
        case(dtype="fp8", cudnn=(9, 7, 0)),
        case(B200, dtype="fp8", head_dim_qk=64, head_dim_v=64),
        case(dtype="fp8", head_dim_qk=256, head_dim_v=256, training=False),
        case(deterministic=True),
        case(A100, deterministic=True, training=False),
    ],
)
def test_a_legal_call_has_no_reason_against_it(legal: AttentionCase) -> None:
    assert refusals(legal) == []


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        # Versions and chips.
        (case((7, 5)), "compute capability 8.0"),
        (case(te=(1, 13)), "Transformer Engine 2.0"),
        (case(cudnn=(8, 9, 7)), "cuDNN 9.0"),
        (case(cudnn=(9, 10, 0)), "faulty"),
        (case(cudnn=(9, 10, 1)), "faulty"),
        (case(B200, cudnn=(9, 6, 0)), "cuDNN 9.7"),
        (case(dtype="fp32"), "trainer.precision=bf16"),
        # Head widths.
        (case(head_dim_qk=100, head_dim_v=100), "multiples of 8, not 100/100"),
        (case(A100, head_dim_qk=256, head_dim_v=256), "above 128"),
        (case(B200, head_dim_qk=256, head_dim_v=256), "above 128"),
        (case(head_dim_qk=256, head_dim_v=256, cudnn=(9, 4, 0)), "cuDNN 9.5"),
        (case(head_dim_qk=256, head_dim_v=256, te=(2, 5)), "Transformer Engine 2.6"),
        (case(head_dim_qk=264, head_dim_v=264), "up to 256"),
        (case(head_dim_v=136, cudnn=(9, 11, 0)), "no backward pass for unequal head widths 128/136"),
        # Packed rows and windows.
        (case(A100, layout="thd"), "packed rows need compute capability 9.0 or 10.x"),
        (case(RTX_PRO, layout="thd"), "packed rows need compute capability 9.0 or 10.x"),
        (case(layout="thd", cudnn=(9, 5, 0)), "packed rows need cuDNN 9.6"),
        (case(window=512, cudnn=(9, 1, 0)), "sliding window needs cuDNN 9.2"),
        (case(layout="thd", window=512, cudnn=(9, 14, 0)), "9.14.0"),
        # FP8 attention.
        (case(A100, dtype="fp8"), "FP8 attention needs compute capability 9.0 or 10.x"),
        (case(RTX_PRO, dtype="fp8"), "FP8 attention needs compute capability 9.0 or 10.x"),
        (case(dtype="fp8", cudnn=(9, 6, 0)), "FP8 attention needs cuDNN 9.7"),
        (case(dtype="fp8", layout="thd"), "FP8 attention does not support packed rows"),
        (case(dtype="fp8", window=512), "FP8 attention has no sliding window"),
        (case(dtype="fp8", head_dim_qk=64, head_dim_v=64), "trains only at head widths 128/128, not 64/64"),
        (case(dtype="fp8", head_dim_v=16), "trains only at head widths 128/128, not 128/16"),
        (case(dtype="fp8", head_dim_qk=264, head_dim_v=264, training=False), "up to head width 256"),
        (case(B200, dtype="fp8", head_dim_qk=256, head_dim_v=256), "up to head width 128"),
        (case(B200, dtype="fp8", head_dim_qk=72, head_dim_v=72), "multiples of 16, not 72/72"),
        # Deterministic kernels.
        (case(A100, deterministic=True), "deterministic backward"),
        (case(B200, deterministic=True), "deterministic backward"),
        (case(dtype="fp8", deterministic=True), "deterministic backward"),
    ],
)
def test_an_illegal_call_is_refused_with_the_reason(refused: AttentionCase, said: str) -> None:
    assert any(said in reason for reason in refusals(refused)), refusals(refused)


def test_every_reason_is_given_at_once() -> None:
    reasons = refusals(case(A100, dtype="fp8", layout="thd", window=512, cudnn=(9, 1, 0)))
    assert len(reasons) == len(set(reasons)) == 7, reasons


def test_what_has_a_backward_pass_has_a_forward_pass() -> None:
    for trained in all_cases():
        if not refusals(trained):
            assert refusals(replace(trained, training=False)) == [], trained


def test_what_goes_packed_or_windowed_goes_plain() -> None:
    for special in all_cases():
        if not refusals(special):
            assert refusals(replace(special, layout="sbhd", window=None)) == [], special


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_the_mass_call_is_legal_wherever_the_bfloat16_output_is(chip: tuple[int, int], width: int) -> None:
    """So the mass never narrows down where a model can train."""
    for cudnn, layout, window in product(CUDNNS, ["sbhd", "thd"], [None, 512]):
        output = case(chip, cudnn, head_dim_qk=width, head_dim_v=width, layout=layout, window=window)
        if not refusals(output):
            assert refusals(mass_call_case(output)) == [], output


def test_the_mass_call_of_fp8_attention_is_bfloat16_and_otherwise_the_same_call() -> None:
    output = case(dtype="fp8", window=None)
    assert mass_call_case(output) == replace(output, dtype="bf16", head_dim_v=16)
    assert refusals(output) == refusals(mass_call_case(output)) == []
    assert mass_call_case(case(dtype="fp16")).dtype == "fp16"


def test_the_error_names_the_machine_and_the_calls_of_each_reason() -> None:
    output = case(A100, layout="thd")
    with pytest.raises(ValueError) as refused:
        refuse_illegal({"output": output, "audio mass": mass_call_case(output)})
    message = str(refused.value)
    assert "Transformer Engine 2.9 with cuDNN 9.13.0 on compute capability 8.0" in message
    assert "- output, audio mass: packed rows need compute capability 9.0 or 10.x; unset packed_tokens" in message


def test_a_reason_against_one_call_names_that_call_alone() -> None:
    output = case(dtype="fp8", head_dim_qk=64, head_dim_v=64)
    with pytest.raises(ValueError, match=r"- output: FP8 attention on 9\.0 trains only at head widths 128/128"):
        refuse_illegal({"output": output, "audio mass": mass_call_case(output)})


def test_legal_calls_pass() -> None:
    refuse_illegal({"output": case(), "audio mass": mass_call_case(case())})


@pytest.mark.parametrize(
    ("recipe", "chip", "te", "said"),
    [
        ("delayed", A100, (2, 9), "FP8 needs compute capability 8.9"),
        ("mxfp8", H100, (2, 9), "mxfp8 needs compute capability 10.x, not 9.0"),
        ("mxfp8", RTX_PRO, (2, 9), "mxfp8 needs compute capability 10.x, not 12.0"),
        ("mxfp8", B200, (2, 0), "mxfp8 needs Transformer Engine 2.1"),
        ("tensorwise", H100, (2, 1), "tensorwise needs Transformer Engine 2.2"),
        ("delayed", L40S, (2, 0), None),
        ("tensorwise", H100, (2, 2), None),
        ("mxfp8", B200, (2, 1), None),
    ],
)
def test_fp8_linears_run_where_their_recipe_does(
    recipe: Any, chip: tuple[int, int], te: tuple[int, int], said: str | None
) -> None:
    reasons = fp8_recipe_refusals(recipe, Machine(chip=chip, cudnn=(9, 13, 0), te=te))
    assert reasons == [] if said is None else said in reasons[0]


def test_the_table_in_the_docs_is_current() -> None:
    remedy = "put the output of `python tests/unit/attention/te_table.py` in its place"
    assert support_table() in DOC.read_text(), f"the table of {DOC} is not the rules'; {remedy}"


def test_the_table_shows_what_was_read_upstream() -> None:
    rows = {(cells[1], cells[2]): cells[3:8] for cells in (split(line) for line in support_table().splitlines()[2:])}
    assert rows["mass, 128/16", "backward"] == ["9.0+", "9.0+", "9.0+", "9.7+", "9.7+"]
    assert rows["one call for both, 128/136", "backward"] == ["no", "no", "9.5 to 9.10.2", "no", "no"]
    assert rows["output, packed, window", "backward"] == ["no", "no", "9.6+, not 9.14", "9.7+, not 9.14", "no"]
    assert rows["FP8 output, 128/128", "backward"] == ["no", "no", "9.7+", "9.7+", "no"]


def split(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")]
