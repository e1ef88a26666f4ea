"""A run whose start was taught something else is refused before anything is built."""

import gzip
from dataclasses import replace

import pytest

from nemo_mapo.config.run import PretrainedConfig
from nemo_mapo.data.splits import manifest_path
from nemo_mapo.embedded.synthetic import SyntheticCorpusConfig, write_corpus
from nemo_mapo.training.start_check import check_start_fits
from tests.unit.test_config import run_config

CHECKPOINT = PretrainedConfig(restore_from_path="somewhere")


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
