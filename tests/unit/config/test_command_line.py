"""The command line of the entry points: help, --cfg, --info, other configs, a typo that imports no torch."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nemo_mapo.config.command_line import compose_command_line, read_command_line
from nemo_mapo.config.load import ConfigError, load
from nemo_mapo.config.run import RunConfig
from nemo_mapo.entry import visible_gpus

ROOT = Path(__file__).parents[3]
PRIMARY = ROOT / "conf" / "train_mapo.yaml"
COMMANDS = ("train_mapo", "sft", "evaluate", "serve_vllm", "plan", "ablation")
HEAVY = ("torch", "nemo", "megatron", "lhotse", "transformers")
TYPOS = """
import runpy, sys
for command in {commands}:
    sys.argv = [command, *(["--"] if command == "ablation" else []), "rollout.batchsize=3"]
    try:
        runpy.run_path(f"examples/{{command}}.py", run_name="__main__")
    except SystemExit as end:
        print(command, end.code)
print(sorted(set(sys.modules) & set({heavy})))
"""


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        compose_command_line(PRIMARY, arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_a_typo_is_answered_by_every_command_before_torch_or_nemo_is_imported():
    code = TYPOS.format(commands=COMMANDS, heavy=HEAVY)
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    said = ran.stdout + ran.stderr
    assert said.count("rollout.batchsize=3: unknown key; did you mean batch_size?") == len(COMMANDS)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_the_config_of_a_command_line_is_checked():
    assert read_command_line(PRIMARY, RunConfig, ["seed=3"]).seed == 3
    with pytest.raises(SystemExit) as ended:
        read_command_line(PRIMARY, RunConfig, ["seed=-3", "objective.eta=x"])
    assert "config: 2 problems" in str(ended.value) and "seed=-3" in str(ended.value)


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [1.0])])
def test_of_several_processes_the_first_one_speaks_and_the_others_wait_for_it(monkeypatch, rank, waits):
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended:
        read_command_line(PRIMARY, RunConfig, ["seed=-3"])
    assert waited == waits and (ended.value.code == 1) == bool(waits)


def test_help_lists_what_can_be_chosen_and_says_where_every_key_is(capsys):
    said = printed(capsys, "--help")
    assert "python examples/train_mapo.py" in said and "objective: attention_only, defaults, grpo" in said
    assert "docs/configuration.md" in said and "benchmark:" not in said
    assert len(said.splitlines()) < 50


def test_the_composed_config_can_be_printed_and_read_again(capsys):
    plain = yaml.safe_load(printed(capsys, "seed=5", "--cfg", "job", "--resolve"))
    assert load(plain, RunConfig) == read_command_line(PRIMARY, RunConfig, ["seed=5"])
    assert "${data.corpus_dir}/tokenizer" in printed(capsys, "--cfg", "job")


def test_information_names_places_and_options(capsys):
    said = printed(capsys, "--info", "objective=grpo")
    assert str(ROOT / "conf") in said and "objective=grpo" in said and "experiment=null" in said


def test_options_may_stand_before_and_after_overrides(tmp_path):
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "mine.yaml").write_text("defaults: [defaults, _self_]\neta: 0.7\n")
    for arguments in (["--config-dir", str(tmp_path), "objective=mine"], ["objective=mine", "-cd", str(tmp_path)]):
        assert compose_command_line(PRIMARY, arguments).objective.eta == 0.7


def test_another_primary_config_is_taken_by_name_directory_or_path(tmp_path):
    assert compose_command_line(PRIMARY, ["--config-name", "sft"]).trainer.sft.max_epochs == 10
    own = tmp_path / "own.yaml"
    own.write_text("seed: 3\n")
    assert compose_command_line(PRIMARY, ["--config-name", str(own)]).seed == 3
    assert compose_command_line(PRIMARY, ["--config-path", str(tmp_path), "--config-name", "own"]).seed == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hlp"], "unrecognized arguments: --hlp; did you mean --help?"),
        (["--config-name", "train_map"], "did you mean train_mapo?"),
        (["--multirun", "seed=1,2"], "write a loop in the shell"),
        (["--cfg", "all"], "invalid choice"),
        (["--config-dir"], "expected one argument"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, said):
    with pytest.raises(ConfigError) as refused:
        compose_command_line(PRIMARY, arguments)
    assert said in str(refused.value)


def test_gpus_are_counted_unless_they_are_hidden(tmp_path, monkeypatch):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(tmp_path) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert visible_gpus(tmp_path) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus(tmp_path) == 0
