"""In bfloat16 a step is that of float32 as far as bfloat16 goes, whole and split."""

import pytest
import torch

from support.layouts import Layout, dense_config, one_step, relative, whole_gradients, write_start
from support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

# Eight bits of mantissa, over four layers forward and backward.
GRADIENT_TOLERANCE, LOSS_TOLERANCE = 0.1, 0.03


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bfloat16")
    path = str(folder / "start")
    # Gentle weights: with sharp ones a maximum changes its head, and a gradient its place, by rounding.
    config = dense_config(init_method_std=0.05)
    (batch,) = run_on_ranks(write_start, 1, path, config)
    (plain,) = run_on_ranks(one_step, 1, Layout(), config, path, str(folder / "plain"), batch)
    return config, path, batch, plain, whole_gradients(config, str(folder / "plain"))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(name="plain", dtype=torch.bfloat16),
        Layout(name="tensor 2", ranks=2, model={"tensor_model_parallel_size": 2}, dtype=torch.bfloat16),
        Layout(name="packed", model={"packed_tokens": 90}, dtype=torch.bfloat16),
    ],
    ids=lambda layout: layout.name,
)
def test_loss_and_gradient_are_near_those_of_float32(start, layout, tmp_path):
    config, path, batch, plain, expected = start
    outcomes = run_on_ranks(one_step, layout.ranks, layout, config, path, str(tmp_path / "out"), batch)
    gradients = whole_gradients(config, str(tmp_path / "out"))
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()])
    whole_expected = torch.cat([expected[name].flatten() for name in gradients])
    assert outcomes[0].loss == pytest.approx(plain.loss, rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE)
    assert relative(whole, whole_expected) < GRADIENT_TOLERANCE
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
