"""The train command with TARS: two groups of a prompt, each trained with the prompt it was sampled from."""

import pytest

from tests.integration.tiny_run import metrics, train, write_tiny_corpus

pytestmark = pytest.mark.integration


def test_tars_trains_on_completions_that_hear_and_that_read(tmp_path):
    corpus = write_tiny_corpus(tmp_path / "synthetic")
    overrides = ["objective=tars", "rewards.tars={behaviour: 0}", "trainer.mapo.num_rollouts_per_prompt=4",
                 "model.global_batch_size=8", "trainer.mapo.max_steps=2", "data.test_ds=null"]  # fmt: skip
    finished = train(corpus, tmp_path / "run", *overrides)
    assert finished.returncode == 0, finished.stderr[-3000:]
    steps = metrics(tmp_path / "run")[1:]
    assert len(steps) == 2
    for record in steps:
        assert {"rollout/tars_without_reference", "rollout/accuracy_speech", "rollout/accuracy_text"} <= record.keys()
        # The log-probabilities that training starts from are those of sampling: same prompts for both halves.
        assert record["rollout/log_prob_gap"] < 1e-3
