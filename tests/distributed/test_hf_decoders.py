"""Imported text LLMs, sharded: each layout computes what transformers does, and its checkpoint exports alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.qwen_omni_ranks import in_layout
from integration.hf_decoder_tiny import save_tiny_decoder
from integration.qwen_omni_tiny import hf_greedy, hf_logits, row, tensors_of

from nemo_mapo.models.hf.convert import export_hf, import_hf
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-4
NEW_TOKENS = 6


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama 3", {"tensor_model_parallel_size": 2}),
        ("qwen 2", {"pipeline_model_parallel_size": 2}),
        ("qwen 3 with experts", {"expert_model_parallel_size": 2}),
    ],
)
def test_a_sharded_decoder_is_the_one_that_was_imported(name: str, layout: dict[str, Any], tmp_path: Path) -> None:
    install_cpu_host()
    initialize_parallel()
    hf = save_tiny_decoder(tmp_path / "original", name)
    import_hf(hf.directory, tmp_path / "imported")
    rows = [row("qwen2_5_omni", length, seed=length) for length in (9, 300)]
    wanted, continuations = hf_logits(hf, rows), [hf_greedy(hf, one, NEW_TOKENS) for one in rows]
    saved = str(tmp_path / "saved")
    outcomes = run_on_ranks(in_layout, 2, str(tmp_path / "imported"), layout, rows, NEW_TOKENS, saved)
    on_last_stage = [logits for logits, _ in outcomes if logits]
    assert on_last_stage
    for logits in on_last_stage:
        assert max(float((a - b).abs().max()) for a, b in zip(logits, wanted, strict=True)) <= TOLERANCE
    assert all(found == continuations for _, found in outcomes)
    export_hf(tmp_path / "saved", hf.directory, tmp_path / "exported")
    before, after = tensors_of(hf.directory), tensors_of(tmp_path / "exported")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
