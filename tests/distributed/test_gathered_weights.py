"""A model that is cut over ranks gives a rollout engine the tensors that it would have in one process, bit for bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed.gather_ranks import Gathered, gathered, served, unsharded_state

from nemo_mapo.config.adapters import LoraConfig
from nemo_mapo.config.model import ModelConfig, NemoPerceptionConfig
from support.layouts import Layout, dense_config, moe_config, write_start
from support.ranks import run_on_ranks
from support.tiny import SAMPLE_RATE, tiny_tokenizer

pytestmark = pytest.mark.distributed

TENSOR_2 = {"tensor_model_parallel_size": 2}
SEQUENCE = TENSOR_2 | {"sequence_parallel": True}
STAGES_2 = {"pipeline_model_parallel_size": 2}
EXPERTS_2 = {"expert_model_parallel_size": 2}
UNTIED = {"share_embeddings_and_output_weights": False}
NEMO_ENCODER: dict[str, Any] = {
    "preprocessor": {
        "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
        "sample_rate": SAMPLE_RATE,
        "features": 16,
        "dither": 0.0,
    },
    "encoder": {
        "_target_": "nemo.collections.asr.modules.ConformerEncoder",
        "feat_in": 16,
        "feat_out": -1,
        "n_layers": 2,
        "d_model": 8,
        "subsampling": "dw_striding",
        "subsampling_factor": 4,
        "subsampling_conv_channels": 8,
        "n_heads": 2,
        "conv_kernel_size": 5,
        "conv_norm_type": "batch_norm",
        "dropout": 0.0,
        "dropout_pre_encoder": 0.0,
        "dropout_emb": 0.0,
        "dropout_att": 0.0,
    },
    "modality_adapter": {
        "_target_": "nemo.collections.multimodal.speech_llm.modules.modality_adapters.IdentityConnectors",
        "d_model": 8,
    },
}
"""Its layers are numbered too, and its batch norms have counters without an axis."""

MODELS = {
    "tied": dense_config(),
    "untied": dense_config(**UNTIED, add_qkv_bias=True),
    "a vocabulary of its own": dense_config(**UNTIED, vocab_size=45),
    "adapters": replace(dense_config(), lora=LoraConfig(rank=3, alpha=6.0)),
    "experts": moe_config(),
    "NeMo's encoder": replace(dense_config(), perception=NemoPerceptionConfig(module=NEMO_ENCODER)),
}
CASES = [
    ("tied", Layout(name="tensor 2", ranks=2, model=TENSOR_2)),
    ("tied", Layout(name="tensor 2, sequence", ranks=2, model=SEQUENCE)),
    ("tied", Layout(name="tensor 2, bfloat16", ranks=2, model=TENSOR_2, dtype=torch.bfloat16)),
    ("tied", Layout(name="pipeline 2", ranks=2, model=STAGES_2)),
    ("tied", Layout(name="tensor 2 x pipeline 2", ranks=4, model=TENSOR_2 | STAGES_2)),
    ("untied", Layout(name="pipeline 2", ranks=2, model=STAGES_2)),
    ("untied", Layout(name="tensor 2 x data 2", ranks=4, model=TENSOR_2)),
    ("a vocabulary of its own", Layout(name="tensor 4", ranks=4, model={"tensor_model_parallel_size": 4})),
    ("adapters", Layout(name="tensor 2", ranks=2, model=TENSOR_2)),
    ("experts", Layout(name="expert 2", ranks=2, model=EXPERTS_2)),
    ("experts", Layout(name="tensor 2, sequence", ranks=2, model=SEQUENCE)),
    ("experts", Layout(name="pipeline 2 x expert 2", ranks=4, model=STAGES_2 | EXPERTS_2)),
    ("NeMo's encoder", Layout(name="tensor 2", ranks=2, model=TENSOR_2)),
]


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A checkpoint of each model, made when it is asked for."""
    folder = tmp_path_factory.mktemp("starts")

    class Starts(dict[str, str]):
        def __missing__(self, name: str) -> str:
            path = str(folder / name.replace(" ", "_"))
            run_on_ranks(write_start, 1, path, MODELS[name])
            self[name] = path
            return path

    return Starts()


def on_ranks(layout: Layout, model: ModelConfig, start: str) -> list[Gathered]:
    return run_on_ranks(gathered, layout.ranks, layout, model, start)


@pytest.mark.parametrize(("name", "layout"), CASES, ids=[f"{name}, {layout.name}" for name, layout in CASES])
def test_the_first_rank_gets_the_state_of_the_unsharded_model(
    starts: dict[str, str], name: str, layout: Layout
) -> None:
    expected = unsharded_state(Layout(dtype=layout.dtype), MODELS[name], starts[name])
    first, *others = on_ranks(layout, MODELS[name], starts[name])
    assert first.tensors.keys() == expected.keys()
    for key, value in expected.items():
        found = first.tensors[key]
        assert (found.shape, found.dtype) == (value.shape, value.dtype), key
        assert torch.equal(found, value), key
    assert first.kept == 0, "tensors are not collected"
    assert [other.tensors for other in others] == [{}] * len(others)


def test_the_vocabulary_of_these_models_is_padded_where_it_is_cut() -> None:
    assert len(tiny_tokenizer()) % 2 == 1
    assert MODELS["a vocabulary of its own"].decoder.vocab_size == 45


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_rank_of_an_unsharded_model_gives_its_own_tensors(starts: dict[str, str], ranks: int) -> None:
    expected = unsharded_state(Layout(), MODELS["tied"], starts["tied"])
    for rank in on_ranks(Layout(ranks=ranks), MODELS["tied"], starts["tied"]):
        assert list(rank.tensors) == list(expected)
        assert all(torch.equal(rank.tensors[name], value) for name, value in expected.items())
        assert rank.shared == len(expected), "nothing is copied"


@pytest.mark.parametrize("name", ["tied", "adapters", "experts"])
@pytest.mark.parametrize("cut", [SEQUENCE, STAGES_2], ids=["tensor 2", "pipeline 2"])
def test_vllm_is_sent_the_same_from_every_layout(starts: dict[str, str], name: str, cut: dict[str, Any]) -> None:
    (whole,) = run_on_ranks(served, 1, Layout(), MODELS[name], starts[name])
    first, other = run_on_ranks(served, 2, Layout(ranks=2, model=cut), MODELS[name], starts[name])
    assert other == {} and first.keys() == whole.keys()
    assert all(torch.equal(first[key], value) for key, value in whole.items())
    assert not any("lora" in key for key in whole)
    assert torch.equal(whole["lm_head.weight"], whole["model.embed_tokens.weight"])
