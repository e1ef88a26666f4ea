"""Paths, processes and accounts that a run needs are looked at before data is read, and all of them at once."""

import pytest

from nemo_mapo.config.load import ConfigError
from nemo_mapo.config.start import CHECKPOINT_FILE, check_start
from nemo_mapo.training import checkpoint
from tests.unit.test_config import run_config


@pytest.fixture
def place(tmp_path):
    """A corpus and a checkpoint as far as their paths go."""
    corpus = tmp_path / "corpus"
    (corpus / "tokenizer").mkdir(parents=True)
    (corpus / "tokenizer" / "tokenizer_config.json").touch()
    for split in ("train", "validation", "test"):
        (corpus / f"cuts_{split}.jsonl.gz").touch()
    step = tmp_path / "start" / "checkpoints" / "step_000020"
    step.mkdir(parents=True)
    (step / CHECKPOINT_FILE).touch()
    return tmp_path


def checked(place, *overrides):
    config = run_config(
        f"data.corpus_dir={place / 'corpus'}", f"exp_manager.explicit_log_dir={place / 'run'}", *overrides
    )
    check_start(config)
    return config


def refusal(place, *overrides):
    with pytest.raises(ConfigError) as refused:
        checked(place, *overrides)
    return str(refused.value)


@pytest.mark.parametrize("key", ["pretrained_checkpoint.restore_from_path", "data.tokenizer", "warm_start.cuts_path"])
def test_a_path_that_cannot_be_looked_at_is_named(place, key):
    assert f"{'a' * 300}" in (said := refusal(place, f"{key}={'a' * 300}")) and "File name too long" in said


def test_what_marks_a_checkpoint_is_what_marks_it_where_it_is_written():
    assert checkpoint._STATE_FILE == CHECKPOINT_FILE


def test_a_run_that_has_what_it_needs_may_start(place):
    checked(place)
    checked(place, "~warm_start", f"pretrained_checkpoint.restore_from_path={place}/start/checkpoints/step_000020")
    checked(place, "~warm_start", "model.from_scratch=true")


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("start/checkpoints/step_00020", "no such directory; did you mean step_000020?"),
        ("start", "name one of its checkpoints, e.g. "),
        ("start/checkpoints", "name one of its checkpoints, e.g. "),
        ("corpus", f"not a complete nemo-mapo checkpoint (no {CHECKPOINT_FILE})"),
        ("nowhere/step_1", "no such directory (nor "),
    ],
)
def test_a_wrong_checkpoint_is_said_with_the_right_one(place, start, said):
    told = refusal(place, f"pretrained_checkpoint.restore_from_path={place / start}")
    assert f"pretrained_checkpoint.restore_from_path={place / start}: {said}" in told


def test_every_path_that_is_not_there_is_named_at_once(place):
    (place / "corpus" / "cuts_train.jsonl.gz").rename(place / "corpus" / "cut_train.jsonl.gz")
    told = refusal(
        place,
        "data.tokenizer=nowhere",
        "rollout=vllm",
        "rollout.vllm.python=no/python",
        "rollout.vllm.original=no/model",
    )
    assert f"data.train_ds.input_cfg[0]: no manifest at {place}/corpus/cuts_train.jsonl.gz; did you mean cut_" in told
    for key in ("warm_start.cuts_path=", "data.tokenizer='nowhere'", "rollout.vllm.python=", "rollout.vllm.original="):
        assert key in told


def test_manifests_of_phases_groups_and_lists_are_looked_for_and_shards_are_left_to_their_reader(place):
    group = "{type: group, input_cfg: [{type: nemo, manifest_filepath: [[no.json, 2]]}]}"
    told = refusal(place, f"data.train_ds.input_cfg=[{group}, {{type: lhotse_shar, shar_path: no}}]")
    assert "data.train_ds.input_cfg[0].input_cfg[0]: no manifest at no.json" in told
    assert "data.train_ds.input_cfg[1]: no manifest at no" in told
    told = refusal(place, "data=synthetic_two_phase", "data.prepared_dir=no")
    assert "data.train_ds.phases[1].input_cfg[3]: no manifest at no/count/cuts_train.jsonl.gz" in told
    sharded = "{type: nemo, manifest_filepath: no__OP_0..3_CL_.json}"
    checked(place, f"data.train_ds.input_cfg=[{sharded}]")


def test_a_run_from_noise_is_refused_with_the_ways_out(place):
    told = refusal(place, "~warm_start")
    assert "neither a warm start nor pretrained_checkpoint.restore_from_path" in told
    assert "examples/sft.py" in told and "model.from_scratch=true" in told
    with pytest.raises(ConfigError, match=r"would start from random weights: set pretrained_checkpoint"):
        check_start(run_config(f"data.prepared_dir={place}/corpus", primary="sft"))


def test_rewards_that_are_all_0_teach_nothing(place):
    weights = [f"rewards.terms.{name}.weight=0" for name in ("accuracy", "format", "consistency")]
    assert "rewards.terms: every weight is 0" in refusal(place, *weights)
    checked(place, *weights[1:])


def test_a_directory_in_use_or_not_writable_is_refused(place):
    (place / "run").mkdir()
    (place / "run" / "metrics.jsonl").touch()
    assert "already holds a run" in refusal(place)
    checked(place, "exp_manager.resume_if_exists=true")
    (place / "file").touch()
    assert "cannot write there" in refusal(place, f"exp_manager.explicit_log_dir={place}/file/run")


def test_another_number_of_processes_is_refused(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes were started" in refusal(place)


def test_weights_and_biases_needs_an_account_and_no_other_field(place, monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "not logged in to Weights & Biases" in refusal(place, "exp_manager.create_wandb_logger=true")
    checked(place, "exp_manager.create_wandb_logger=true", "exp_manager.wandb_logger_kwargs={offline: true}")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    checked(place, "exp_manager.create_wandb_logger=true")
    with pytest.raises(ConfigError, match=r"'projct', not an argument of WandbLogger; did you mean project\?"):
        run_config("exp_manager.wandb_logger_kwargs={projct: x}")


def test_a_run_is_written_where_nemo_would_write_it():
    assert run_config("exp_manager.exp_dir=a", "exp_manager.name=b").exp_manager.explicit_log_dir == "a/b"
    assert run_config("exp_manager.name=b", "exp_manager.explicit_log_dir=c").exp_manager.explicit_log_dir == "c"
    with pytest.raises(ConfigError, match="must be given together"):
        run_config("exp_manager.name=null")
    with pytest.raises(ConfigError, match="explicit_log_dir='': '' is not a path: give one"):
        run_config("exp_manager.explicit_log_dir=''")


def test_a_custom_reward_whose_package_is_missing_is_named(place):
    own = "rewards.terms.own={type: custom, path: no_such_package.rewards:length, weight: "
    assert "rewards.terms.own.path=no_such_package.rewards:length: no module no_such_package" in refusal(
        place, own + "1}"
    )
    checked(place, own + "0}")
