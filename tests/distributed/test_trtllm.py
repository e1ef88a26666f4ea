"""Rollouts of the TensorRT-LLM backend where policy and engine are cut over tensor-parallel ranks."""

import pytest
import torch
from distributed.trtllm_ranks import generate

from nemo_mapo.config.run import SamplingConfig
from support.layouts import Layout, dense_config, write_start
from support.ranks import run_on_ranks

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
        for completions in run_on_ranks(generate, 2, cut, base, start, sampling):
            for one, expected in zip(completions, plain, strict=True):
                assert torch.equal(one.token_ids, expected.token_ids)
                torch.testing.assert_close(one.log_probs, expected.log_probs, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(one.sampling_log_probs, expected.sampling_log_probs, atol=1e-4, rtol=1e-4)
