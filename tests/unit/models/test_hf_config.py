"""What is read of a text LLM's config.json in the names of transformers 4 and 5, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_mapo.config.model import DecoderConfig
from nemo_mapo.models.hf.models import read_model

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def decoder(directory: Path, kind: str = "llama", **fields: Any) -> DecoderConfig:
    (directory / "config.json").write_text(json.dumps({"model_type": kind, **SHAPE, **fields}))
    return read_model(directory).config.decoder


@pytest.mark.parametrize(
    ("fields", "base", "scaling", "factor"),
    [
        ({}, 10000, None, 1.0),
        ({"rope_theta": 5e5, "rope_scaling": None}, 500000, None, 1.0),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 500000, "llama3", 32.0),
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, 500000, "llama3", 32.0),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, 1000000, None, 1.0),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, 1000000, None, 1.0),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10000, "linear", 2.0),
    ],
    ids=str,
)
def test_the_rotary_embedding_is_read_in_both_forms(tmp_path, fields, base, scaling, factor) -> None:
    found = decoder(tmp_path, **fields)
    assert (found.rotary_base, found.rope_scaling, found.rope_scaling_factor) == (base, scaling, factor)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn', only 'default', 'linear' and"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type='longrope'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}, "rope_type='mrope'"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 8.0}}, "rope high_freq_factor=8.0, only 4 is supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope low_freq_factor=None, only 1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 3}}, "rope beta=3 is not known"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta: 10000.0 and 1000000.0 are both"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope full_attention=.* is not known"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope partial_rotary_factor=0.5, only 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, only 1 is supported"),
        ({"attention_bias": True}, "attention_bias=True, only False"),
        ({"mlp_bias": True}, "mlp_bias=True, only False"),
        ({"residual_multiplier": 0.22}, "residual_multiplier=0.22 is not known, and may change the function"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not known"),
        ({"auto_map": {"AutoModel": "own.py"}}, "auto_map=.* is not known"),
    ],
    ids=str,
)
def test_a_function_that_is_not_computed_is_refused_by_name(tmp_path, fields, named) -> None:
    with pytest.raises(ValueError, match=rf"config.json: .*{named}"):
        decoder(tmp_path, **fields)


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "use_sliding_window=True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has .'sliding_attention'."),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=False, only True"),
        ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}, "mlp_only_layers=.1., only"),
    ],
)
def test_a_familys_own_options_are_refused_too(tmp_path, kind, fields, named) -> None:
    with pytest.raises(ValueError, match=named):
        decoder(tmp_path, kind, **fields)


def test_fields_that_change_nothing_are_taken(tmp_path) -> None:
    plain = decoder(tmp_path)
    neutral = {"torch_dtype": "bfloat16", "dtype": "bfloat16", "is_llama_config": True, "rope_interleaved": False}
    neutral |= {"transformers.js_config": {}, "use_cache": True, "eos_token_id": [1, 2], "sliding_window": None}
    neutral |= {"_model_name_or_path": "of the one that trained it", "unk_token_id": 0}
    assert decoder(tmp_path, **neutral) == plain


def test_a_broken_config_is_named(tmp_path) -> None:
    for text, named in (("{", "is not JSON"), ("[]", "holds a list"), ("[" * 100_000, "is not JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config.json {named}"):
            read_model(tmp_path)
