"""FP8 options: passed to Megatron by name, and refused where Megatron would refuse or ignore them."""

import dataclasses
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_mapo.config.precision import PrecisionConfig

MEGATRON_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}


def test_every_option_is_megatrons_with_megatrons_default() -> None:
    ours = {field.name: field.default for field in dataclasses.fields(PrecisionConfig)}
    assert ours == {name: MEGATRON_DEFAULTS[name] for name in ours}


def test_without_fp8_megatron_gets_no_option() -> None:
    assert PrecisionConfig().megatron_settings() == {}


def test_what_is_set_reaches_megatron_by_name() -> None:
    chosen: dict[str, Any] = {
        "fp8": "hybrid",
        "fp8_margin": 1,
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "fp8_wgrad": False,
        "fp8_dot_product_attention": True,
        "tp_only_amax_red": True,
    }
    settings = PrecisionConfig(**chosen).megatron_settings()
    assert settings == chosen
    megatron = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, **settings)
    assert {name: dataclasses.asdict(megatron)[name] for name in chosen} == chosen


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fp8_amax_history_len": 8}, "fp8_amax_history_len=8 has no effect without FP8; set fp8"),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8", "fp8_dot_product_attention": True}, "set fp8_recipe to delayed"),
        ({"fp8": "e4m3", "first_last_layers_bf16": True}, "set fp8_recipe to tensorwise or mxfp8"),
        ({"fp8": "e5m2"}, "hybrid"),
        ({"fp8": "hybrid", "fp8_amax_history_len": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PrecisionConfig(**options)
