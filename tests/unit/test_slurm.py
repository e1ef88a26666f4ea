"""The SLURM scripts: what they would start, and how a job is cut short, saved and put back into the queue.

srun, squeue and scontrol are stand-ins on the PATH that write down their arguments.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from nemo_mapo.config.load import load
from nemo_mapo.config.run import RunConfig
from tests.integration.tiny_run import TINY_MODEL, metrics, write_tiny_corpus

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "examples" / "slurm"
SCRIPTS = sorted(SLURM.iterdir())
TRAIN, WITH_SERVERS = SLURM / "train.sbatch", SLURM / "train_with_servers.sbatch"
PATIENCE_SECONDS = 240.0
"""Until something is taken for hung; a busy machine imports NeMo for half a minute."""

SRUN = """\
#!/usr/bin/env bash
# Writes its arguments down, runs the command (or $STEP in its place) as process 0, and hands USR1 on like srun does.
printf '%s\\n' "$(printf '%q ' "$@")" >> "$RECORD/srun"
while [[ $1 == --* ]]; do shift; done
export SLURM_PROCID=0 SLURM_LOCALID=0
if [[ -n ${STEP:-} ]]; then set -- bash -c "$STEP"; fi
signalled=0
"$@" & task=$!
trap 'signalled=1; kill -USR1 $task' USR1
trap 'kill -KILL $task; exit 143' TERM
wait $task; status=$?
if [[ $signalled == 1 ]]; then wait $task; status=$?; fi
exit $status
"""
SCONTROL = """\
#!/usr/bin/env bash
if [[ $1 == show ]]; then tr , '\\n' <<<"$3"; else echo "$*" >> "$RECORD/scontrol"; fi
"""
SQUEUE = """\
#!/usr/bin/env bash
echo "  ${TIME_LEFT:-1:00:00}"
"""


class Job:
    """A job on a cluster of stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        programs = folder / "programs"
        programs.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RECORD": str(folder),
            "RUN_DIR": str(self.run_dir),
            "PYTHON": sys.executable,
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "n1,n2",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, script: Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(script), *overrides],
            cwd=ROOT,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: Path, *overrides: str, **environment: str) -> tuple[int, str]:
        """Exit status and output of the script."""
        process = self.start(script, *overrides, **environment)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        return process.returncode, output

    def recorded(self, program: str) -> list[list[str]]:
        """Arguments of the calls of a stand-in."""
        file = self.folder / program
        return [shlex.split(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def overrides_of(arguments: list[str]) -> dict[str, str]:
    return dict(argument.split("=", 1) for argument in arguments if re.match(r"[a-z_.]+=", argument))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([shellcheck, "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_groups_of_the_job_are_the_trainers_the_rollout_node_and_the_judge() -> None:
    groups = WITH_SERVERS.read_text().split("#SBATCH hetjob")
    nodes = [re.search(r"#SBATCH --nodes=(\d+)", group) for group in groups]
    assert [match and int(match[1]) for match in nodes] == [3, 1, 1]
    assert "#SBATCH --requeue" in groups[0]
    assert "#SBATCH --signal=B:USR1@" in groups[0]


def test_a_dry_run_prints_the_srun_line_and_the_resolved_config(job: Job) -> None:
    code, output = job.run(TRAIN, "trainer.mapo.max_steps=7", DRY_RUN="1", GPUS_PER_NODE="4", TIME_LEFT="2-00:00:00")
    assert code == 0, output
    line, _, config = output.partition("# resolved config of examples/train_mapo.py\n")
    assert shlex.split(line)[:2] == ["+", "srun"]
    assert {"--nodes=2", "--ntasks-per-node=4", "examples/train_mapo.py"} <= set(shlex.split(line))
    trainer = yaml.safe_load(config)["trainer"]
    assert (trainer["num_nodes"], trainer["devices"], trainer["accelerator"]) == (2, 4, "gpu")
    assert trainer["mapo"]["max_steps"] == 7
    assert trainer["mapo"]["max_time_per_run"] == "01:23:40:00"
    assert job.recorded("srun") == []


def test_a_dry_run_needs_no_slurm(job: Job) -> None:
    nothing = {"SLURM_JOB_ID": "", "SLURM_JOB_NODELIST": "", "DRY_RUN": "1", "PYTHON": "true"}
    judge = {"JUDGE_COMMAND": "vllm serve some/model --port 8001", "JUDGE_MODEL": "some/model"}
    code, output = job.run(WITH_SERVERS, "objective.eta=0.1", **nothing, **judge)
    assert code == 0, output
    lines = [shlex.split(line)[1:] for line in output.splitlines() if line.startswith("+ ")]
    groups = ["--het-group=1", "--het-group=2", "--het-group=0"]
    assert [next(word for word in line if "het-group" in word) for line in lines] == groups
    rollout, judge_line, trainer = lines
    assert "examples/serve_vllm.py" in rollout
    assert judge_line[-1] == "exec vllm serve some/model --port 8001"
    given = overrides_of(trainer)
    assert given["trainer.num_nodes"] == "3"
    assert given["rollout.vllm.urls"] == "[http://rollout1:8000]"
    assert given["rewards.judge.base_url"] == "http://judge1:8001/v1"
    assert given["rewards.judge.model"] == "some/model"
    assert given["objective.eta"] == "0.1"


def test_servers_and_trainer_get_configs_that_fit_each_other(job: Job) -> None:
    judge = {"JUDGE_COMMAND": "serve", "JUDGE_MODEL": "some/model"}
    groups = {f"SLURM_JOB_NODELIST_HET_GROUP_{number}": f"n{number}" for number in range(3)}
    more = {"ROLLOUT_OVERRIDES": "rollout.vllm.serve_args=[--tensor-parallel-size,8]", "DRY_RUN": "1"}
    cut = (
        "model.tensor_model_parallel_size=2",
        "model.sequence_parallel=true",
        "model.micro_batch_size=8",
        "model.global_batch_size=64",
    )
    code, output = job.run(WITH_SERVERS, *cut, **judge, **groups, **more)
    assert code == 0, output
    server_part, trainer_part = re.findall(r"# resolved config of .*\n((?:(?![+#]).*\n)+)", output)
    server, trainer = (load(yaml.safe_load(part), RunConfig) for part in (server_part, trainer_part))
    assert server.rollout.vllm is not None and trainer.rollout.vllm is not None
    assert (server.rollout.vllm.host, server.rollout.vllm.serve_args) == ("0.0.0.0", ("--tensor-parallel-size", 8))
    assert trainer.rollout.vllm.urls == (f"http://n1:{server.rollout.vllm.port}",)
    assert server.model == trainer.model and server.data == trainer.data
    assert server.exp_manager.explicit_log_dir == trainer.exp_manager.explicit_log_dir
    assert f"export {server.rollout.vllm.api_key_variable}\n" in WITH_SERVERS.read_text()
    assert trainer.rewards.judge.base_url == "http://n2:8001/v1"


def test_a_container_is_named_in_every_step(job: Job) -> None:
    image = "/images/nemo-mapo.sqsh"
    code, output = job.run(TRAIN, DRY_RUN="1", PYTHON="true", CONTAINER=image, MOUNTS="/data:/data")
    assert code == 0, output
    wanted = {f"--container-image={image}", "--container-mounts=/data:/data", f"--container-workdir={ROOT}"}
    assert wanted <= set(shlex.split(output.splitlines()[0]))


@pytest.mark.parametrize(
    ("left", "limit"),
    [("1-02:03:04", "01:01:43:04"), ("4:00:00", "00:03:40:00"), ("30:00", "00:00:10:00"), ("08:09:09", "00:07:49:09")],
)
def test_the_run_ends_before_the_job_does(job: Job, left: str, limit: str) -> None:
    code, output = job.run(TRAIN, TIME_LEFT=left, STEP="true")
    assert code == 0, output
    (call,) = job.recorded("srun")
    assert overrides_of(call)["trainer.mapo.max_time_per_run"] == limit
    assert overrides_of(call)["exp_manager.resume_if_exists"] == "true"


@pytest.mark.parametrize(
    ("left", "said"),
    [("15:00", "less than SAVE_MARGIN_SECONDS=1200 are left"), ("UNLIMITED", "tells no time limit ('UNLIMITED')")],
)
def test_a_job_without_time_to_train_in_starts_nothing(job: Job, left: str, said: str) -> None:
    code, output = job.run(TRAIN, TIME_LEFT=left)
    assert code == 2
    assert said in output
    assert job.recorded("srun") == []


SAVE = "mkdir -p $RUN_DIR/checkpoints/step_0000{}"
CUT_SHORT = """echo '{"events": [{"message": "ended before its last step; continue"}]}' > $RUN_DIR/run.json"""


def test_the_scripts_know_the_words_of_a_run_that_was_cut_short() -> None:
    (words,) = re.findall(r"^ENDED_EARLY='(.+)'$", (SLURM / "functions.sh").read_text(), re.MULTILINE)
    assert f'ENDED_EARLY = "{words}' in (ROOT / "nemo_mapo" / "launch.py").read_text()
    assert words in CUT_SHORT


def test_a_run_that_was_cut_short_goes_back_into_the_queue(job: Job) -> None:
    code, output = job.run(TRAIN, STEP=f"{SAVE.format(20)}; {CUT_SHORT}")
    assert code == 0, output
    assert job.recorded("scontrol") == [["requeue", "4711"]]


def test_a_finished_run_does_not(job: Job) -> None:
    code, output = job.run(TRAIN, STEP=f"{SAVE.format(20)}; echo '{{}}' > $RUN_DIR/run.json")
    assert code == 0, output
    assert job.recorded("scontrol") == []


def test_a_run_that_makes_no_progress_does_not(job: Job) -> None:
    (job.run_dir / "checkpoints" / "step_000020").mkdir(parents=True)
    code, output = job.run(TRAIN, STEP=f"{SAVE.format(40)}.unfinished; {CUT_SHORT}")
    assert code == 2
    assert "cut short without a new checkpoint" in output
    assert job.recorded("scontrol") == []


def test_a_run_that_failed_does_not_and_its_status_is_the_jobs(job: Job) -> None:
    code, output = job.run(TRAIN, STEP=f"{SAVE.format(20)}; {CUT_SHORT}; exit 7")
    assert code == 7
    assert "the trainer ended with status 7" in output
    assert job.recorded("scontrol") == []


def test_restarts_are_counted(job: Job) -> None:
    code, output = job.run(TRAIN, STEP=f"{SAVE.format(20)}; {CUT_SHORT}", SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
    assert code == 2
    assert "restarted MAX_RESTARTS=3 times" in output


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM], ids=["time limit", "preemption"])
def test_a_signal_lets_the_trainer_save_before_the_job_is_requeued(job: Job, sent: signal.Signals) -> None:
    step = job.folder / "step.sh"
    # Like rank.sh: USR1, not TERM, reaches the tasks of srun.
    step.write_text(f"""
        save() {{ {SAVE.format(60)}; {CUT_SHORT}; exit; }}
        trap save USR1
        touch $RECORD/ready
        while :; do sleep 0.05; done
    """)
    process = job.start(TRAIN, STEP=f"exec bash {step}")
    wait_until((job.folder / "ready").exists, process)
    process.send_signal(sent)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, output
    assert (job.run_dir / "checkpoints" / "step_000060").is_dir()
    assert job.recorded("scontrol") == [["requeue", "4711"]]


RANK = """
import os, signal, sys, time
def end(*_):
    print("saved", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, end)
print(os.environ["RANK"], os.environ["LOCAL_RANK"], flush=True)
while True:
    time.sleep(0.05)
"""


def test_a_rank_knows_its_number_and_hears_usr1_as_term_though_slurm_signals_all_processes() -> None:
    environment = os.environ | {"SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    command = ["bash", str(SLURM / "rank.sh"), sys.executable, "-c", RANK]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "9 1\n"
    os.killpg(process.pid, signal.SIGUSR1)
    assert process.communicate(timeout=PATIENCE_SECONDS)[0] == "saved\n"
    assert process.returncode == 3


def servers(job: Job, **environment: str) -> tuple[int, str]:
    groups = {f"SLURM_JOB_NODELIST_HET_GROUP_{number}": "localhost" for number in range(3)}
    judge = {"JUDGE_COMMAND": "true", "JUDGE_MODEL": "judge"}
    return job.run(WITH_SERVERS, **groups | judge | environment)


def test_a_server_that_ends_before_it_listens_ends_the_job(job: Job) -> None:
    code, output = servers(job, STEP="exit 1", ROLLOUT_PORT="1", JUDGE_PORT="1")
    assert code == 2
    assert "the vLLM ended before it accepted connections" in output
    assert len(job.recorded("srun")) == 2, "no trainer"


def test_a_server_that_never_listens_ends_the_job(job: Job) -> None:
    code, output = servers(job, STEP="exec sleep 600", SERVER_START_SECONDS="1", ROLLOUT_PORT="1")
    assert code == 2
    assert "the vLLM accepted no connection on localhost:1 within 1 s" in output


def test_servers_without_a_judge_are_refused_by_the_name_of_the_variable(job: Job) -> None:
    code, output = job.run(WITH_SERVERS, DRY_RUN="1")
    assert (code, output.strip().split(":")[:2]) == (2, ["error", " JUDGE_COMMAND is not set"])


LISTEN = "import socket, sys, time; s = socket.create_server(('localhost', int(sys.argv[1]))); time.sleep(600)"


@pytest.fixture
def ports() -> Iterator[tuple[str, str]]:
    """Two free ports."""
    import socket

    with socket.create_server(("localhost", 0)) as first, socket.create_server(("localhost", 0)) as second:
        found = str(first.getsockname()[1]), str(second.getsockname()[1])
    yield found


def test_the_trainer_starts_when_both_servers_listen_and_they_end_with_it(job: Job, ports: tuple[str, str]) -> None:
    listen = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(LISTEN)}"
    by_group = f'case "$ARGUMENTS" in *group=1*) {listen} {ports[0]};; *group=2*) {listen} {ports[1]};; esac'
    srun = job.folder / "programs" / "srun"
    srun.write_text(SRUN.replace("while [[", 'export ARGUMENTS="$*"\nwhile [[', 1))
    code, output = servers(job, STEP=by_group, ROLLOUT_PORT=ports[0], JUDGE_PORT=ports[1])
    assert code == 0, output
    assert len(job.recorded("srun")) == 3
    given = overrides_of(job.recorded("srun")[2])
    assert given["rollout.vllm.urls"] == f"[http://localhost:{ports[0]}]"


@pytest.mark.integration
@pytest.mark.integration
def test_a_real_run_is_cut_short_by_the_signal_and_goes_on_in_the_next_job(job: Job, tmp_path: Path) -> None:
    corpus = write_tiny_corpus(tmp_path / "corpus")
    overrides = (
        f"data.corpus_dir={corpus}",
        "~warm_start",
        "trainer.mapo.val_check_interval=2",
        "trainer.mapo.save_interval=2",
        "data.test_ds=null",
        *TINY_MODEL,
        "trainer.accelerator=cpu",
    )
    one = {"SLURM_JOB_NODELIST": "localhost", "GPUS_PER_NODE": "1"}
    process = job.start(TRAIN, *overrides, "trainer.mapo.max_steps=30", **one)
    recorded = job.run_dir / "metrics.jsonl"
    wait_until(lambda: recorded.exists() and len(recorded.read_text().splitlines()) > 1, process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, output
    assert job.recorded("scontrol") == [["requeue", "4711"]], output
    reached = max(int(path.name.removeprefix("step_")) for path in (job.run_dir / "checkpoints").glob("step_*"))
    assert 0 < reached < 30
    code, output = job.run(TRAIN, *overrides, f"trainer.mapo.max_steps={reached + 2}", **one)
    assert code == 0, output
    assert f"resuming after step {reached}" in output
    assert [record["step"] for record in metrics(job.run_dir)] == list(range(reached + 3))
    assert json.loads((job.run_dir / "run.json").read_text())["events"] == []
    assert len(job.recorded("scontrol")) == 1, "a finished run is not requeued"
