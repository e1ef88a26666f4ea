"""Rollouts of the TensorRT-LLM backend where policy and engine are cut over tensor-parallel ranks."""

import pytest
import torch
from distributed.trtllm_ranks import generate

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.testing.layouts import Layout, dense_config, write_start
from nemo_mapo.testing.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

SAMPLING = [
    SamplingConfig(temperature=0.0, max_new_tokens=8),
    SamplingConfig(temperature=1.2, top_k=20, top_p=0.95, max_new_tokens=8),
]


def test_tensor_parallel_ranks_have_the_completions_and_log_probs_of_one_process(tmp_path) -> None:
    base, start = dense_config(qk_layernorm=False), str(tmp_path / "start")
    run_on_ranks(write_start, 1, start, base)
    cut = Layout(name="tensor 2", ranks=2, model={"tensor_model_parallel_size": 2})
    for sampling in SAMPLING:
        (plain,) = run_on_ranks(generate, 1, Layout(), base, start, sampling)
        for rollouts in run_on_ranks(generate, 2, cut, base, start, sampling):
            assert torch.equal(rollouts.completions, plain.completions)
            torch.testing.assert_close(rollouts.log_probs, plain.log_probs, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(rollouts.sampling_log_probs, plain.sampling_log_probs, atol=1e-4, rtol=1e-4)
