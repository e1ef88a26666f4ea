"""A run directory belongs to one run."""

import subprocess
import sys

import pytest
import yaml

from nemo_mapo.config.data import PromptConfig
from nemo_mapo.config.load import as_plain, load
from nemo_mapo.config.run import RunConfig
from nemo_mapo.rewards.templates import INSTRUCTIONS
from nemo_mapo.training.finished_run import read_run_config, recorded_wording
from nemo_mapo.training.run_directory import open_run_directory, recorded_config, renewed
from nemo_mapo.types import Wording


def config(path, *, resume=False, prompt=None, **sections):
    split = {"input_cfg": [{"type": "lhotse", "cuts_path": "cuts.jsonl"}]}
    return load(
        {
            "exp_manager": {"explicit_log_dir": str(path), "resume_if_exists": resume},
            "data": {"tokenizer": "tokenizer", "train_ds": split, "validation_ds": split, "prompt": prompt or {}},
            **sections,
        },
        RunConfig,
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


@pytest.mark.parametrize(
    ("switches", "generation"),
    [
        ({"asynchronous": None, "dynamic_sampling": None}, {"type": "synchronous"}),
        ({"asynchronous": {"max_staleness": 0}, "dynamic_sampling": None}, {"type": "synchronous"}),
        (
            {"asynchronous": None, "dynamic_sampling": {"max_generation_rounds": 2}},
            {"type": "dynamic_sampling", "max_generation_rounds": 2},
        ),
    ],
)
def test_a_run_recorded_with_the_switches_of_earlier_versions_is_read_and_resumed(tmp_path, switches, generation):
    now = {"trainer": {"mapo": {"generation": generation}}}
    directory = open_run_directory(config(tmp_path, **now))
    directory.metrics.append([{"step": 0}])
    recorded = yaml.safe_load(directory.config.read_text())
    del recorded["trainer"]["mapo"]["generation"]
    recorded["trainer"]["mapo"] |= switches
    directory.config.write_text(yaml.safe_dump(recorded))
    assert as_plain(read_run_config(tmp_path).trainer.mapo.generation) == generation
    open_run_directory(config(tmp_path, resume=True, **now))


def test_a_recorded_run_that_generated_ahead_does_so_now():
    switches = {"asynchronous": {"max_staleness": 1}, "dynamic_sampling": None, "max_steps": 3}
    expected = {"trainer": {"mapo": {"generation": {"type": "one_ahead"}, "max_steps": 3}}}
    assert renewed({"trainer": {"mapo": switches}}) == expected


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write there"):
        open_run_directory(config(tmp_path / "file" / "run"))


def test_later_records_of_every_file_are_forgotten(tmp_path):
    directory = open_run_directory(config(tmp_path))
    for file in (directory.metrics, directory.rollouts, directory.profiles):
        file.append([{"step": 1}, {"step": 5}])
    directory.write_summary({"test": {}})
    directory.forget_after(2)
    assert directory.metrics.last_step() == 1 and directory.rollouts.read() == [{"step": 1}]
    assert not directory.profiles.path.exists() and not directory.summary.exists()


def test_two_processes_do_not_write_to_one_directory(tmp_path):
    directory = open_run_directory(config(tmp_path))
    lock = str(tmp_path / ".lock")
    code = f"import filelock; held = filelock.FileLock({lock!r}); held.acquire(); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process is training there"), directory.locked():
            pass
        other.kill()
    with directory.locked():
        pass


def test_leftover_checkpoints_count_as_a_run(tmp_path):
    directory = open_run_directory(config(tmp_path))
    (directory.checkpoints / "step_000080").mkdir()
    with pytest.raises(ValueError, match="already holds a run"):
        open_run_directory(config(tmp_path))


def test_the_length_may_not_change_where_it_decides_the_learning_rate(tmp_path):
    cosine = {"optim": {"sched": {"name": "cosine"}}}
    open_run_directory(config(tmp_path, model=cosine)).metrics.append([{"step": 0}])
    with pytest.raises(ValueError, match=r"trainer.mapo.max_steps: -1 then, 7 now"):
        open_run_directory(config(tmp_path, resume=True, model=cosine, trainer={"mapo": {"max_steps": 7}}))


def test_the_words_of_the_prompts_are_recorded_and_a_resumed_run_keeps_them(tmp_path):
    open_run_directory(config(tmp_path)).metrics.append([{"step": 0}])
    recorded = yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["prompt"]
    assert recorded == {"system": None, "instruction": INSTRUCTIONS["think"]}
    assert recorded_wording(tmp_path) == Wording(instruction=INSTRUCTIONS["think"])
    open_run_directory(config(tmp_path, resume=True))
    for prompt in ({"instruction": None}, {"system": "Be brief."}, {"instruction": "Answer."}):
        with pytest.raises(ValueError, match=r"data\.prompt\.(system|instruction): .* then, .* now"):
            open_run_directory(config(tmp_path, resume=True, prompt=prompt))


def test_a_start_that_was_the_best_then_is_recorded_by_its_own_name(tmp_path):
    (tmp_path / "best").symlink_to("step_000002")
    start = {"restore_from_path": str(tmp_path / "best")}
    first = config(tmp_path / "run", pretrained_checkpoint=start)
    assert recorded_config(first)["pretrained_checkpoint"] == {"restore_from_path": str(tmp_path / "step_000002")}
    open_run_directory(first).metrics.append([{"step": 1}])
    (tmp_path / "best").unlink()
    (tmp_path / "best").symlink_to("step_000004")
    with pytest.raises(ValueError, match=r"restore_from_path: .*step_000002' then, .*step_000004' now"):
        open_run_directory(config(tmp_path / "run", resume=True, pretrained_checkpoint=start))


def test_a_run_that_recorded_no_words_asked_with_none(tmp_path):
    open_run_directory(config(tmp_path))
    recorded = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del recorded["data"]["prompt"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded))
    assert recorded_wording(tmp_path) == Wording()
    assert read_run_config(tmp_path).data.prompt == PromptConfig(instruction=None)
    assert recorded_wording(tmp_path / "elsewhere") is None


def test_a_recorded_config_imports_no_code_and_a_resumed_run_names_its_own(tmp_path):
    custom = {"terms": {"mine": {"type": "custom", "path": "no_such_module:reward", "weight": 1.0}}}
    open_run_directory(config(tmp_path, rewards=custom)).metrics.append([{"step": 0}])
    assert "no_such_module:reward" in (tmp_path / "config.yaml").read_text()
    assert list(read_run_config(tmp_path).rewards.computed) == ["accuracy"]
    with pytest.raises(ValueError, match=r"rewards\.terms\.mine\.path: 'no_such_module:reward' then, None now"):
        open_run_directory(config(tmp_path, resume=True))


def test_ranks_other_than_the_main_one_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    directory = open_run_directory(config(tmp_path / "run"))
    with directory.locked():
        directory.write_summary({"title": "run"})
        for file in (directory.metrics, directory.rollouts, directory.profiles, directory.test):
            file.append([{"step": 1}])
        directory.forget_after(0)
    assert not (tmp_path / "run").exists()
