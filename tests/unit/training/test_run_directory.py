"""A run directory belongs to one run."""

from dataclasses import replace

import pytest

from nemo_mapo.config.load import validate
from nemo_mapo.training.run_directory import open_run_directory


def config(path, *, resume=False, **sections):
    split = {"input_cfg": [{"type": "lhotse", "cuts_path": "cuts.jsonl"}]}
    return validate(
        {
            "exp_manager": {"explicit_log_dir": str(path), "resume_if_exists": resume},
            "data": {"tokenizer": "tokenizer", "train_ds": split, "validation_ds": split},
            **sections,
        }
    )


def test_a_new_directory_gets_the_resolved_config(tmp_path):
    directory = open_run_directory(config(tmp_path / "run"))
    assert "global_batch_size: 32" in directory.config.read_text()
    assert directory.checkpoints.is_dir()


def test_a_directory_with_a_run_is_refused_unless_it_is_resumed(tmp_path):
    directory = open_run_directory(config(tmp_path))
    directory.metrics.append([{"step": 0}])
    with pytest.raises(ValueError, match="already holds a run"):
        open_run_directory(config(tmp_path))
    open_run_directory(config(tmp_path, resume=True))


def test_a_resumed_run_may_go_on_longer_but_not_learn_differently(tmp_path):
    open_run_directory(config(tmp_path)).metrics.append([{"step": 0}])
    open_run_directory(config(tmp_path, resume=True, trainer={"mapo": {"max_steps": 7}}))
    with pytest.raises(ValueError, match=r"model.optim.lr: 1e-06 then, 0.001 now"):
        open_run_directory(config(tmp_path, resume=True, model={"optim": {"lr": 1e-3}}))


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write there"):
        open_run_directory(config(tmp_path / "file" / "run"))


def test_later_records_of_every_file_are_forgotten(tmp_path):
    directory = open_run_directory(config(tmp_path))
    for file in (directory.metrics, directory.rollouts, directory.profiles):
        file.append([{"step": 1}, {"step": 5}])
    directory.forget_after(2)
    assert all('"step": 5' not in file.path.read_text() for file in (directory.metrics, directory.rollouts))
    assert replace(directory, path=tmp_path).profiles.path.read_text() == '{"step": 1}\n'
