"""What the rows of a warm-start batch hear: nothing, silence, or their clip."""

import pytest
import torch

from nemo_mapo.config.warm_start import WarmStartConfig, WarmStartStageConfig
from nemo_mapo.data.manifests import load_cuts
from nemo_mapo.data.synthetic import SyntheticCorpusConfig, write_corpus
from nemo_mapo.data.tokenizer import SpecialTokens, build_tokenizer
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.testing.tiny import tiny_model_config
from nemo_mapo.training.build import build_audio_llm
from nemo_mapo.training.warm_start import _BatchMaker
from nemo_mapo.types import Wording

STAGE = WarmStartStageConfig(target="reasoning", steps=1, batch_size=10)


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    corpus = tmp_path_factory.mktemp("corpus")
    write_corpus(SyntheticCorpusConfig(train=12, validation=0, test=0), corpus, progress=False)
    path = corpus / "cuts_train.jsonl.gz"
    install_cpu_host()
    initialize_parallel()
    tokenizer = build_tokenizer()
    special = SpecialTokens.from_tokenizer(tokenizer)
    model = build_audio_llm(tiny_model_config(), vocab_size=len(tokenizer), special=special, sample_rate=16000, seed=0)
    config = WarmStartConfig(cuts_path=str(path), stages=(STAGE,), text_only_share=0.3, silent_clip_share=0.2)
    return _BatchMaker(list(load_cuts(str(path))), tokenizer, model, config, Wording()).batch(STAGE), special


def test_the_first_rows_have_no_audio_and_no_placeholders(batch):
    rows, special = batch
    assert rows.audio_row.tolist() == [-1, -1, -1, 3, 4, 5, 6, 7, 8, 9]
    assert not (rows.tokens[:3] == special.audio_id).any()


def test_the_next_rows_hear_a_clip_of_silence(batch):
    rows, special = batch
    loudest = rows.audio.waveforms.abs().amax(dim=1)
    assert loudest[3] == loudest[4] == 0.0 and (loudest[5:] > 0).all()
    assert ((rows.tokens[3:] == special.audio_id).sum(dim=1) > 0).all()


def test_every_row_has_something_to_learn(batch):
    rows, _ = batch
    assert (rows.completion_lengths > 20).all()
    assert torch.equal(rows.audio.lengths > 0, torch.ones(10, dtype=torch.bool))


def test_shares_that_exceed_the_batch_are_refused():
    with pytest.raises(ValueError, match=r"text_only_share \+ silent_clip_share = 1\.2"):
        WarmStartConfig(cuts_path="x", stages=(STAGE,), text_only_share=0.7, silent_clip_share=0.5)
