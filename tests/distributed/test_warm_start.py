"""The warm start of several processes: each takes its share of every batch, and they keep one result."""

from pathlib import Path

import pytest
import torch
from distributed.warm_start_ranks import started

from nemo_mapo.embedded.synthetic import SyntheticCorpusConfig, write_corpus
from support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> str:
    corpus = tmp_path_factory.mktemp("corpus")
    write_corpus(SyntheticCorpusConfig(train=12, validation=0, test=0), corpus, progress=False)
    return str(corpus / "cuts_train.jsonl.gz")


def test_two_processes_learn_what_one_learns(cuts: str, tmp_path: Path) -> None:
    ((alone, kept),) = run_on_ranks(started, 1, cuts, str(tmp_path / "one"), 1)
    together = run_on_ranks(started, 2, cuts, str(tmp_path / "two"), 1)
    for weights, kept_by_two in together:
        assert kept_by_two == kept
        for name, value in alone.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5, msg=name)
    ((again, _),) = run_on_ranks(started, 1, cuts, str(tmp_path / "two"), 1)
    assert all(torch.equal(again[name], value) for name, value in together[0][0].items())


def test_a_sharded_model_has_to_find_it_in_the_cache(cuts: str, tmp_path: Path) -> None:
    for refused in run_on_ranks(started, 2, cuts, str(tmp_path / "none"), 2):
        assert "whole models" in refused and "tensor_model_parallel_size" in refused
