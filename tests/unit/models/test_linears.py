"""The short way through a linear against Megatron's."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_mapo.models.linears import ColumnLinear, RowLinear
from nemo_mapo.platform import initialize_parallel, install_cpu_host

WIDE, NARROW = 12, 8


def linear(kind: type[ColumnLinear] | type[RowLinear], *, bias: bool, skip_bias_add: bool) -> ColumnLinear | RowLinear:
    install_cpu_host()
    initialize_parallel()
    config = TransformerConfig(num_layers=1, hidden_size=NARROW, num_attention_heads=1, use_cpu_initialization=True)
    side = {"gather_output": False} if kind is ColumnLinear else {"input_is_parallel": True}
    made = kind(
        NARROW,
        WIDE,
        config=config,
        init_method=torch.nn.init.xavier_normal_,
        bias=bias,
        skip_bias_add=skip_bias_add,
        is_expert=False,
        **side,
    )
    if bias:
        torch.nn.init.normal_(made.bias)
    return made


@pytest.mark.parametrize("kind", [ColumnLinear, RowLinear])
@pytest.mark.parametrize(("bias", "skip_bias_add"), [(False, False), (True, False), (True, True)])
def test_without_gradient_the_numbers_are_megatrons_to_the_bit(
    kind: type[ColumnLinear] | type[RowLinear], bias: bool, skip_bias_add: bool
) -> None:
    made = linear(kind, bias=bias, skip_bias_add=skip_bias_add)
    hidden = torch.randn(3, 2, NARROW)
    expected, expected_bias = made(hidden)
    with torch.no_grad():
        output, left = made(hidden)
    assert expected.requires_grad and not output.requires_grad
    assert torch.equal(output, expected)
    assert left is expected_bias
