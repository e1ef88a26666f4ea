"""Text LLMs in and out: imported, a decoder computes what transformers does; exported, it is the same again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.hf_decoder_tiny import CONFIGS, SCALED, save_tiny_decoder
from integration.qwen_omni_tiny import (
    TinyHf,
    hf_greedy,
    hf_logits,
    imported_model,
    our_logits,
    prompts_of,
    row,
    tensors_of,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.hf.convert import CHECKPOINT, export_hf, import_hf
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.rollout.megatron import MegatronRollout
from support.tiny import tiny_tokenizer

pytestmark = pytest.mark.integration

TOLERANCE = 1e-4
NEW_TOKENS = 12
ROWS = [row("qwen2_5_omni", length, seed=length) for length in (5, 40, 700)]
"""The longest turns even the slow frequencies of a rotary embedding, which scaling changes."""


@dataclass(frozen=True)
class Pair:
    hf: TinyHf
    imported: Path
    ours: AudioLLM


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    install_cpu_host()
    initialize_parallel()

    @cache
    def pair(name: str) -> Pair:
        folder = tmp_path_factory.mktemp("decoder")
        hf = save_tiny_decoder(folder / "original", name)
        import_hf(hf.directory, folder / "imported")
        return Pair(hf, folder / "imported", imported_model(folder / "imported"))

    return pair


@pytest.fixture(params=CONFIGS)
def pair(request: pytest.FixtureRequest, make: Callable[[str], Pair]) -> Pair:
    return make(request.param)


def test_logits_of_a_batch_are_those_of_transformers(pair: Pair) -> None:
    found, wanted = our_logits(pair.ours, ROWS), hf_logits(pair.hf, ROWS)
    assert all(logits.std() > 0.5 for logits in wanted)
    assert max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) <= TOLERANCE


@pytest.mark.parametrize("name", SCALED)
def test_scaling_is_seen_in_the_logits(make: Callable[[str], Pair], name: str, tmp_path: Path) -> None:
    shutil.copytree(make(name).hf.directory, tmp_path / "plain")
    state_rope(tmp_path / "plain", "rope_scaling", None)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    without = TinyHf(family="llama", directory=tmp_path / "plain", thinker=plain.eval())
    difference = hf_logits(make(name).hf, ROWS)[-1] - hf_logits(without, ROWS)[-1]
    assert float(difference.abs().max()) > 100 * TOLERANCE


def test_the_greedy_continuation_is_that_of_transformers(pair: Pair) -> None:
    generated = MegatronRollout(pair.ours, tiny_tokenizer(), batch_size=4).generate(
        prompts_of(ROWS),
        SamplingConfig(temperature=0.0, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS),
        group_size=1,
        seeds=torch.arange(len(ROWS)),
    )
    assert [one.token_ids.tolist() for (one,) in generated] == [hf_greedy(pair.hf, row, NEW_TOKENS) for row in ROWS]


def test_what_is_exported_is_what_was_imported_bit_for_bit(pair: Pair, tmp_path: Path) -> None:
    export_hf(pair.imported / CHECKPOINT, pair.hf.directory, tmp_path / "exported")
    before, after = tensors_of(pair.hf.directory), tensors_of(tmp_path / "exported")
    assert list(before) and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    found = hf_logits(TinyHf(family=pair.hf.family, directory=tmp_path, thinker=again), ROWS[:1])
    assert torch.equal(found[0], hf_logits(pair.hf, ROWS[:1])[0])


def rewrite(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Copy a model's directory with its tensors, changed, in one file."""
    target.mkdir()
    for path in source.iterdir():
        if "safetensors" not in path.name:
            (target / path.name).write_bytes(path.read_bytes())
    tensors = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def state_rope(directory: Path, field: str, parameters: dict[str, Any] | None) -> None:
    """State a model's rotary embedding in transformers 4's field or 5's, with the base that it has."""
    path = directory / "config.json"
    values = json.loads(path.read_text())
    stated = {"rope_theta": values.pop("rope_theta", None)} | values.pop("rope_parameters", {})
    values.pop("rope_scaling", None)
    if field == "rope_parameters":
        values[field] = {"rope_theta": stated["rope_theta"], **(parameters or {})}
    else:
        values |= {"rope_theta": stated["rope_theta"], field: parameters}
    path.write_text(json.dumps(values))


def test_leftovers_of_other_versions_are_taken_and_given_back(make: Callable[[str], Pair], tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4, dtype=torch.bfloat16)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(make("qwen 2").hf.directory, tmp_path / "old", add)
    import_hf(tmp_path / "old", tmp_path / "imported")
    export_hf(tmp_path / "imported" / CHECKPOINT, tmp_path / "old", tmp_path / "exported")
    before, after = tensors_of(tmp_path / "old"), tensors_of(tmp_path / "exported")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    rewrite(tmp_path / "old", tmp_path / "other", lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"tie_word_embeddings=true, but lm_head.weight differs"):
        import_hf(tmp_path / "other", tmp_path / "refused")


def test_fused_experts_of_transformers_5_are_the_same_model(make: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = make("qwen 3 with experts")

    def fuse(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            experts = f"model.layers.{layer}.mlp.experts."
            gate, up, down = (
                torch.stack([tensors.pop(f"{experts}{expert}.{part}_proj.weight") for expert in range(4)])
                for part in ("gate", "up", "down")
            )
            tensors[f"{experts}gate_up_proj"] = torch.cat([gate, up], dim=1)
            tensors[f"{experts}down_proj"] = down

    rewrite(pair.hf.directory, tmp_path / "fused", fuse)
    # As transformers 5 writes the config, too.
    state_rope(tmp_path / "fused", "rope_parameters", {"rope_type": "default"})
    path = tmp_path / "fused" / "config.json"
    values = json.loads(path.read_text())
    values["dtype"] = values.pop("torch_dtype", None) or values["dtype"]
    path.write_text(json.dumps(values))
    import_hf(tmp_path / "fused", tmp_path / "imported")
    found = imported_model(tmp_path / "imported").state_dict()
    assert all(
        torch.equal(found[name], value)
        for name, value in pair.ours.state_dict().items()
        if name.startswith("language_model.") and value is not None
    )
    export_hf(tmp_path / "imported" / CHECKPOINT, tmp_path / "fused", tmp_path / "exported")
    before, after = tensors_of(tmp_path / "fused"), tensors_of(tmp_path / "exported")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
