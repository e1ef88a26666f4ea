"""Rollouts and reference passes are the same in every layout, and on all ranks of it."""

from itertools import chain

import pytest
import torch
from distributed.deaf_ranks import deaf_passes

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.rows import Completion, ScoredRow
from support.layouts import Layout, dense_config, generate, reference_signals, write_start
from support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

TENSOR_2 = {"tensor_model_parallel_size": 2}
LAYOUTS = [
    Layout(name="tensor 2", ranks=2, model=TENSOR_2),
    Layout(name="tensor 2, sequence", ranks=2, model=TENSOR_2 | {"sequence_parallel": True}),
    Layout(name="pipeline 2", ranks=2, model={"pipeline_model_parallel_size": 2}),
    Layout(
        name="tensor 2 x pipeline 2, sequence",
        ranks=4,
        model=TENSOR_2 | {"sequence_parallel": True, "pipeline_model_parallel_size": 2},
    ),
]
SAMPLING = [SamplingConfig(temperature=0.0, max_new_tokens=12), SamplingConfig(top_k=20, max_new_tokens=12)]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[ScoredRow]]:
    path = str(tmp_path_factory.mktemp("inference") / "start")
    (batch,) = run_on_ranks(write_start, 1, path, dense_config())
    return path, batch


@pytest.fixture(scope="module")
def plain_rollouts(start: tuple[str, list[ScoredRow]]) -> list[list[list[Completion]]]:
    return [run_on_ranks(generate, 1, Layout(), dense_config(), start[0], sampling)[0] for sampling in SAMPLING]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_completions_and_their_log_probs_are_those_of_the_plain_run(start, plain_rollouts, layout) -> None:
    for sampling, plain in zip(SAMPLING, plain_rollouts, strict=True):
        for groups in run_on_ranks(generate, layout.ranks, layout, dense_config(), start[0], sampling):
            for one, expected in zip(chain(*groups), chain(*plain), strict=True):
                assert torch.equal(one.token_ids, expected.token_ids)
                torch.testing.assert_close(one.log_probs, expected.log_probs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS, Layout(name="packed", model={"packed_tokens": 70})],
    ids=lambda layout: layout.name,
)
def test_reference_passes_are_those_of_the_plain_run(start: tuple[str, list[ScoredRow]], layout: Layout) -> None:
    path, batch = start
    (plain,) = run_on_ranks(reference_signals, 1, Layout(), dense_config(), path, batch)
    for signals in run_on_ranks(reference_signals, layout.ranks, layout, dense_config(), path, batch):
        for found, expected in zip(signals, plain, strict=True):
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_deaf_tokens_are_deaf_on_all_ranks(start: tuple[str, list[ScoredRow]]) -> None:
    path, batch = start
    (plain,) = run_on_ranks(deaf_passes, 1, Layout(), dense_config(), path, batch)
    for log_probs, drawn, heard in run_on_ranks(deaf_passes, 4, LAYOUTS[-1], dense_config(), path, batch):
        torch.testing.assert_close(log_probs, plain[0], atol=2e-5, rtol=1e-4)
        assert torch.equal(drawn, plain[1]) and torch.equal(heard, plain[2])
        assert drawn.shape != heard.shape or not torch.equal(drawn, heard)
