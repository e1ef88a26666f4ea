"""What the rows of a warm-start batch hear: nothing, silence, or their clip."""

import pytest
import torch

from nemo_mapo.config.warm_start import WarmStartConfig, WarmStartStageConfig
from nemo_mapo.data.manifests import load_cuts
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.embedded.synthetic import SyntheticCorpusConfig, write_corpus
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.embedded.warm_start import _BatchMaker, _cosine_with_warmup, _trained
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.training.build import build_audio_llm
from nemo_mapo.training.signals import token_signals
from nemo_mapo.types import Wording
from support.tiny import tiny_model_config

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
    heard = [bool((row.prompt.token_ids == special.audio_id).any()) for row in rows]
    assert heard == [False] * 3 + [True] * 7
    assert all(len(row.prompt.clips) == 1 for row in rows), "each clip is encoded, so that the last bits stay the same"


def test_the_next_rows_hear_a_clip_of_silence(batch):
    rows, _ = batch
    loudest = [float(row.prompt.clips[0].abs().max()) for row in rows]
    assert loudest[3] == loudest[4] == 0.0 and min(loudest[5:]) > 0


def test_every_row_has_something_to_learn(batch):
    rows, _ = batch
    assert all(len(row.token_ids) > 20 for row in rows)


def test_the_weights_are_those_of_a_plain_torch_loop_bit_for_bit(tmp_path):
    """Published results start from these weights, so the code that is shared with examples/sft.py may not move them."""
    write_corpus(SyntheticCorpusConfig(train=12, validation=0, test=0), tmp_path / "corpus", progress=False)
    tokenizer = build_tokenizer()
    special = SpecialTokens.from_tokenizer(tokenizer)

    def build():
        return build_audio_llm(
            tiny_model_config(), vocab_size=len(tokenizer), special=special, sample_rate=16000, seed=0
        )

    stage = WarmStartStageConfig(target="reasoning", steps=3, batch_size=10)
    config = WarmStartConfig(cuts_path=str(tmp_path / "corpus" / "cuts_train.jsonl.gz"), stages=(stage,), lr=1e-2)
    plain = build()
    maker = _BatchMaker(list(load_cuts(config.cuts_path)), tokenizer, plain, config, Wording())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    for step in range(stage.steps):
        optimizer.param_groups[0]["lr"] = config.lr * _cosine_with_warmup(step / stage.steps)
        rows = maker.batch(stage)
        log_probs = torch.cat([one.log_probs for one in token_signals(plain, rows, head_reduction=None)])
        optimizer.zero_grad()
        (-log_probs.mean()).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    trained = _trained(build(), config, tokenizer, Wording())
    for (name, value), other in zip(trained.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_shares_that_exceed_the_batch_are_refused():
    with pytest.raises(ValueError, match=r"text_only_share \+ silent_clip_share = 1\.2"):
        WarmStartConfig(cuts_path="x", stages=(STAGE,), text_only_share=0.7, silent_clip_share=0.5)
