"""The Transformer Engine layer spec on a host without Transformer Engine: what it asks of Megatron, and its refusal."""

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_mapo.attention.session import AttentionSession
from nemo_mapo.config.precision import PrecisionConfig
from nemo_mapo.models.te_spec import te_layer_specs, te_settings


def test_megatron_may_choose_fused_attention_alone_so_that_nothing_slower_runs_silently() -> None:
    settings = te_settings(PrecisionConfig(fp8="hybrid"))
    assert settings == {"attention_backend": AttnBackend.fused, "fp8": "hybrid"}
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, **settings)
    assert config.attention_backend == AttnBackend.fused


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has what the test wants to be missing")
def test_a_host_without_transformer_engine_is_refused_before_anything_is_built() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    with pytest.raises(ValueError, match=r"needs the package transformer_engine|needs a CUDA device"):
        te_layer_specs(config, AttentionSession([0]), layout="sbhd")
