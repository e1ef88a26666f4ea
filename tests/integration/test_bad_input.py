"""What a user gets wrong ends in one clear message, before anything is built or written."""

import pytest

from tests.integration.tiny_run import train, write_tiny_corpus

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "synthetic")


def refused(corpus, run_dir, *overrides):
    """Run, expect a refusal, and return what was said."""
    finished = train(corpus, run_dir, *overrides)
    assert finished.returncode != 0
    said = finished.stdout + finished.stderr
    assert "Traceback" not in said, said[-3000:]
    return said


def test_bad_values_are_named_together_with_their_paths(corpus, tmp_path):
    run_dir = tmp_path / "run"
    said = refused(
        corpus, run_dir, "trainer.mapo.num_rollouts_per_prompt=1", "objective.eta=high", "model.target_layers=[9]"
    )
    assert "trainer.mapo.num_rollouts_per_prompt=1: Input should be greater than or equal to 2" in said
    assert "objective.eta='high': Input should be a valid number" in said
    assert "target_layers=[9]: [9] beyond the model, whose layers are 0..1" in said
    assert not run_dir.exists()


def test_a_missing_audio_file_is_found_before_training(tmp_path):
    corpus = write_tiny_corpus(tmp_path / "synthetic")
    lost = sorted((corpus / "audio" / "train").glob("*.flac"))[3]
    lost.unlink()
    said = refused(corpus, tmp_path / "run")
    assert lost.stem in said and "cuts_train.jsonl.gz" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_directory_that_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = refused(corpus, tmp_path / "file" / "run")
    assert "exp_manager.explicit_log_dir=" in said and "choose another directory" in said


def test_a_run_is_not_resumed_with_another_config(corpus, tmp_path):
    run_dir = tmp_path / "run"
    assert train(corpus, run_dir, "trainer.mapo.max_steps=2").returncode == 0
    said = refused(corpus, run_dir, "exp_manager.resume_if_exists=true", "objective.eta=0.5")
    assert "objective.eta: 0.05 then, 0.5 now" in said
