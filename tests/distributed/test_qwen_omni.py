"""Imported Qwen Omni thinkers, split: each layout computes what transformers does, and its checkpoint exports alike."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.qwen_omni_ranks import in_layout
from integration.qwen_omni_tiny import (
    FAMILIES,
    Family,
    Row,
    TinyHf,
    clip,
    hf_greedy,
    hf_logits,
    row,
    save_tiny,
    tensors_of,
)

from nemo_mapo.models.hf.convert import export_hf, import_hf
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-4
NEW_TOKENS = 6
TENSOR_2: dict[str, Any] = {"tensor_model_parallel_size": 2}
SEQUENCE: dict[str, Any] = {"sequence_parallel": True}
EXPERTS_2: dict[str, Any] = {"expert_model_parallel_size": 2}
LAYOUTS: list[tuple[Family, int, dict[str, Any]]] = [
    ("qwen2_5_omni", 2, TENSOR_2),
    ("qwen2_5_omni", 3, {"pipeline_model_parallel_size": 3}),
    ("qwen3_omni_moe", 2, EXPERTS_2),
    ("qwen3_omni_moe", 2, TENSOR_2 | SEQUENCE),
]


@dataclass(frozen=True)
class Wanted:
    hf: TinyHf
    imported: Path
    rows: list[Row]
    logits: list[torch.Tensor]
    continuations: list[list[int]]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Wanted]:
    install_cpu_host()
    initialize_parallel()
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        hf = save_tiny(folder / "original", family)
        import_hf(hf.directory, folder / "imported")
        rows = [
            row(family, 9),
            row(family, 4, clip(24123), 5),
            row(family, 2, clip(9000, seed=1), 7),
            row(family, 2, clip(20000, seed=2), 3, clip(9000, seed=3), 4),
        ]
        continuations = [hf_greedy(hf, one, NEW_TOKENS) for one in rows if len(one[1]) == 1]
        made[family] = Wanted(hf, folder / "imported", rows, hf_logits(hf, rows), continuations)
    return made


@pytest.mark.parametrize(("family", "ranks", "layout"), LAYOUTS, ids=str)
def test_a_split_model_is_the_one_that_was_imported(
    wanted: dict[Family, Wanted], family: Family, ranks: int, layout: dict[str, Any], tmp_path: Path
) -> None:
    one = wanted[family]
    outcomes = run_on_ranks(in_layout, ranks, str(one.imported), layout, one.rows, NEW_TOKENS, str(tmp_path / "saved"))
    on_last_stage = [logits for logits, _ in outcomes if logits]
    assert on_last_stage
    for logits in on_last_stage:
        assert max(float((a - b).abs().max()) for a, b in zip(logits, one.logits, strict=True)) <= TOLERANCE
    assert all(continuations == one.continuations for _, continuations in outcomes)
    export_hf(tmp_path / "saved", one.hf.directory, tmp_path / "exported")
    before, after = tensors_of(one.hf.directory), tensors_of(tmp_path / "exported")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
