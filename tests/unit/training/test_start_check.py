"""A run without a start, or with one that was taught something else, is refused before anything is built."""

import gzip
from dataclasses import replace

import pytest

from nemo_mapo.config.run import PretrainedConfig
from nemo_mapo.data.splits import manifest_path
from nemo_mapo.embedded.synthetic import SyntheticCorpusConfig, write_corpus
from nemo_mapo.training.start_check import check_start_fits, check_start_given
from tests.unit.test_config import run_config

CHECKPOINT = PretrainedConfig(restore_from_path="somewhere")


def test_a_run_from_noise_is_refused_with_the_ways_out():
    with pytest.raises(ValueError, match=r"neither a warm start nor .*restore_from_path") as refused:
        check_start_given(run_config("~warm_start"))
    assert "examples/sft.py" in str(refused.value) and "model.from_scratch=true" in str(refused.value)


def test_supervised_training_from_noise_is_refused_too():
    with pytest.raises(ValueError, match=r"would start from random weights: set pretrained_checkpoint"):
        check_start_given(run_config("data.prepared_dir=x", primary="sft"))


@pytest.mark.parametrize("given", ["model.from_scratch=true", "pretrained_checkpoint.restore_from_path=x"])
def test_a_start_or_the_wish_for_none_is_enough(given):
    check_start_given(run_config("~warm_start", given))
    check_start_given(run_config("data.prepared_dir=x", given, primary="sft"))


@pytest.fixture
def corpora(tmp_path):
    for name in ("own", "other"):
        write_corpus(SyntheticCorpusConfig(train=3, validation=1, test=1), tmp_path / name, progress=False)
    other = manifest_path(tmp_path / "other", "train")
    renamed = other.with_name("renamed.jsonl")
    renamed.write_bytes(gzip.decompress(other.read_bytes()).replace(b'"train-', b'"mine-'))
    return tmp_path / "own", renamed


def test_training_cuts_that_the_warm_start_never_saw_are_counted(corpora):
    own, foreign = corpora
    config = run_config(f"data.corpus_dir={own}")
    check_start_fits(config)
    item = f"{{type: lhotse, cuts_path: {foreign}}}"
    mixed = run_config(f"data.corpus_dir={own}", f"data.train_ds.input_cfg=[{item}]")
    with pytest.raises(ValueError, match=r"^3 of 3 cuts of data\.train_ds \(mine-\S+, \.\.\.\) are not in warm_start"):
        check_start_fits(mixed)
    check_start_fits(replace(mixed, pretrained_checkpoint=CHECKPOINT))
