"""The tables of names and layout rules, and what import of Qwen Omni refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_mapo.config.model import DecoderConfig
from nemo_mapo.models.hf.files import ModelFiles, shard_layout
from nemo_mapo.models.hf.layouts import GateUp, QueryKeyValue
from nemo_mapo.models.hf.models import read_model
from nemo_mapo.models.hf.weights import WeightMap
from nemo_mapo.models.qwen_omni.weights import ENCODER_RULES, LEFT_ASIDE

DECODER = DecoderConfig(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=8)
OURS = (
    "language_model.embedding.word_embeddings.weight",
    "language_model.decoder.layers.0.self_attention.linear_qkv.weight",
    "language_model.decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight",
    "perception.module.conv1.weight",
)
THEIRS = (
    "thinker.model.embed_tokens.weight",
    *(f"thinker.model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"),
    "thinker.model.layers.0.mlp.experts.3.gate_proj.weight",
    "thinker.model.layers.0.mlp.experts.3.up_proj.weight",
    "thinker.audio_tower.conv1.weight",
)


def weight_map() -> WeightMap:
    return WeightMap(DECODER, rules=ENCODER_RULES, prefix="thinker.", left_aside=LEFT_ASIDE)


def test_query_key_and_value_stand_together_by_group() -> None:
    # Two groups of two query heads of one row each: heads 0 1 | 2 3, keys 10 11, values 20 21.
    layout = QueryKeyValue(groups=2, heads_per_group=2)
    query, key, value = (torch.tensor(rows).float()[:, None] for rows in ([0, 1, 2, 3], [10, 11], [20, 21]))
    fused = layout.fuse([query, key, value])
    assert fused.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert all(torch.equal(one, other) for one, other in zip(layout.split(fused), (query, key, value), strict=True))


def test_the_gate_stands_above_the_up_projection() -> None:
    gate, up = torch.zeros(2, 3), torch.ones(2, 3)
    fused = GateUp().fuse([gate, up])
    assert fused[:, 0].tolist() == [0, 0, 1, 1]
    assert all(torch.equal(one, other) for one, other in zip(GateUp().split(fused), (gate, up), strict=True))


def test_every_tensor_of_ours_has_its_sources() -> None:
    sources = weight_map().sources(OURS, [*THEIRS, "talker.model.norm.weight", "thinker.visual.blocks.0.weight"])
    assert [name for source in sources.values() for name in source.theirs] == list(THEIRS)


def test_a_tensor_that_is_missing_or_left_over_is_named() -> None:
    with pytest.raises(ValueError, match=r"1 missing from the files: thinker.model.embed_tokens.weight"):
        weight_map().sources(OURS, THEIRS[1:])
    with pytest.raises(ValueError, match=r"neither mapped nor left aside: thinker.model.layers.0.extra"):
        weight_map().sources(OURS, [*THEIRS, "thinker.model.layers.0.extra"])
    with pytest.raises(ValueError, match=r"no rule .* covers our tensor language_model.strange"):
        weight_map().source("language_model.strange")


def write_config(directory: Path, **text: object) -> None:
    values = {
        "model_type": "qwen2_5_omni",
        "thinker_config": {"text_config": {"hidden_size": 64, "num_attention_heads": 4, **text}},
    }
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "preprocessor_config.json").write_text(json.dumps({"feature_size": 128}))


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("use_sliding_window", True, "use_sliding_window=True, only False"),
        ("hidden_act", "gelu", "hidden_act='gelu', only 'silu'"),
        ("rope_theta", 0.5, "rope_theta=0.5, only whole numbers"),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0}, "rope_type='linear', only 'default' is"),
    ],
)
def test_what_megatron_would_compute_otherwise_is_refused(
    tmp_path: Path, option: str, value: object, named: str
) -> None:
    write_config(tmp_path, **{option: value})
    with pytest.raises(ValueError, match=rf"config.json: text_config: .*{named}"):
        read_model(tmp_path)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"model_type='gpt2'; this command knows llama, qwen2, .*, qwen2_5_omni"):
        read_model(tmp_path)
    with pytest.raises(ValueError, match=r"no config.json"):
        read_model(tmp_path / "absent")


def test_both_versions_of_transformers_say_the_same_with_their_names(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    write_config(tmp_path / "old", rope_theta=5000.0, rope_scaling={"type": "mrope", "mrope_section": [4, 2, 2]})
    rope = {"rope_theta": 5000.0, "rope_type": "default", "mrope_section": [4, 2, 2]}
    write_config(tmp_path / "new", rope_parameters=rope, dtype="bfloat16")
    for name, token in (("old", "audio_token_index"), ("new", "audio_token_id")):
        values = json.loads((tmp_path / name / "config.json").read_text())
        values["thinker_config"][token] = 7
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    own = tmp_path / "new" / "preprocessor_config.json"
    processor = {"feature_extractor": json.loads(own.read_text()), "processor_class": "Qwen2_5OmniProcessor"}
    (tmp_path / "new" / "processor_config.json").write_text(json.dumps(processor))
    own.unlink()
    old, new = read_model(tmp_path / "old"), read_model(tmp_path / "new")
    assert new.config == old.config and old.config.decoder.rotary_base == 5000
    assert new.audio_token_id == old.audio_token_id == 7
    (tmp_path / "new" / "processor_config.json").unlink()
    with pytest.raises(ValueError, match=r"no preprocessor_config.json, and no feature_extractor in processor_config"):
        read_model(tmp_path / "new")


def test_an_unknown_field_of_the_encoder_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["thinker_config"]["audio_config"] = {"d_model": 24, "num_hidden_layers": 2, "n_new_windows": 3}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"audio_config: n_new_windows=3.* is not known"):
        read_model(tmp_path)


def test_only_whole_safetensors_are_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only pytorch_model.bin, whose format can run code"):
        ModelFiles(tmp_path)
    save_file({"a": torch.zeros(2)}, str(tmp_path / "model.safetensors"))
    assert torch.equal(ModelFiles(tmp_path).read("a"), torch.zeros(2))
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        ModelFiles(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names model-1.safetensors, but they are missing"):
        ModelFiles(tmp_path)


def test_shards_are_filled_up_to_their_limit() -> None:
    layout = shard_layout({"a": 4, "b": 4, "c": 3}, limit=8)
    assert list(layout.values()) == [["a", "b"], ["c"]]
    assert shard_layout({"a": 4}, limit=8) == {"model.safetensors": ["a"]}
