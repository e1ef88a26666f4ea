"""A training run that loses servers, weights, the judge and the network's speed, beside one that does not.

`python benchmarks/fault_run.py --check` trains the embedded model with rollouts from two servers and verdicts of a
judge, all of them processes or sockets of their own. In the disturbed run every answer of a rollout server takes 2 s
longer, one server is killed while it generates, the other in the middle of a weight update, the judge is gone for a
minute, and at last both servers are killed at once, so that the run has to save, stop and be resumed. It must end with
the weights and the samples of the other run.
"""

import argparse
import contextlib
import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from nemo_mapo.data.synthetic import SyntheticCorpusConfig, write_corpus
from nemo_mapo.data.tokenizer import build_tokenizer, load_tokenizer
from nemo_mapo.platform import hide_cuda_devices, initialize_parallel, install_cpu_host
from nemo_mapo.training.checkpoint import load_checkpoint
from nemo_mapo.training.finished_run import find_checkpoint, read_run_config
from nemo_mapo.training.policies import build_policy

ROOT = Path(__file__).parents[1]
STEPS = 6
GROUP = 8
PER_STEP = 2
"""Optimiser steps of a rollout batch: weights of step s have version 2 s."""
GENERATING, UPDATING, JUDGING, ALONE = 1, 2, 3, 4
"""Steps, from 0: a server is killed while it generates, the other in an update, the judge goes, both servers die."""
MISMATCH_NATS = 1e-5
"""Rounding; one batch from the weights of the step before is far above."""
KILL_AFTER_SECONDS = {"/v1/chat/completions": 0.02, "/v1/weights": 0.002}
"""Between sending a request and killing the server that has it; an update of this model takes some 20 ms."""


def main() -> None:
    """Run both, compare, and print what happened."""
    arguments = parse_arguments()
    with contextlib.ExitStack() as stack:
        directory = Path(arguments.keep or stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        write_corpus(SyntheticCorpusConfig(train=160, validation=4, test=4), directory / "corpus", progress=False)
        build_tokenizer().save_pretrained(directory / "corpus" / "tokenizer")
        undisturbed = Stage(directory, "undisturbed", delay_seconds=0.0, judge_gone_seconds=0.0)
        undisturbed.run()
        disturbed = Stage(
            directory, "disturbed", delay_seconds=arguments.delay, judge_gone_seconds=arguments.judge_gone
        )
        disturbed.run()
        report(disturbed, undisturbed, check=arguments.check)


@dataclass
class Server:
    """A rollout server behind a proxy of ours, which delays answers and kills it at the moment that a plan names."""

    stage: "Stage"
    number: int
    process: "subprocess.Popen[str] | None" = None
    port: int = 0
    url: str = ""

    def start(self) -> None:
        """Start the process, again on the same port, and wait until it serves."""
        self.port = self.port or free_port()
        command = [
            sys.executable,
            str(ROOT / "examples" / "serve_rollouts.py"),
            f"data.tokenizer={self.stage.corpus / 'tokenizer'}",
            f"serving.sync_dir={self.stage.weights}",
            f"serving.port={self.port}",
            "trainer.num_threads=1",
            # A prompt's group by itself: what else is in a batch changes last bits, and so a draw now and then.
            f"rollout.batch_size={GROUP}",
        ]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
        )
        assert self.process.stdout is not None
        if not any(line.startswith("serving at") for line in self.process.stdout):
            sys.exit(f"rollout server {self.number} ended before it served")
        if not self.url:
            self.url = serve_http(self.answer)

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """At once, as a machine that fails."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes] | None:
        """Hand a request on; None breaks the connection off."""
        if path == "/v1/weights":
            # So that it is certain which servers are there in which step.
            self.stage.wait_for_replacements()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            connection.request(method, path, body or None, {"Content-Type": "application/json"})
            dies = self.stage.is_to_die(self, path, body)
            if dies:
                time.sleep(KILL_AFTER_SECONDS[path])
                self.kill()
            reply = connection.getresponse()
            status, content = reply.status, reply.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        if dies:
            self.stage.happened.append(f"  but server {self.number} had answered before it was killed")
        time.sleep(self.stage.delay_seconds)
        return status, content


@dataclass
class Stage:
    """A run with its servers and its judge, and the plan of what befalls them."""

    directory: Path
    name: str
    delay_seconds: float
    judge_gone_seconds: float
    happened: list[str] = field(default_factory=list)
    sessions: int = 0
    second_session: list[int] = field(default_factory=list)
    """Versions of the weights that the servers were sent after the run had stopped."""
    version: int = 0
    verdicts: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _done: set[int] = field(default_factory=set)
    _judge_back: float = 0.0
    _replacing: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.corpus = self.directory / "corpus"
        self.weights = self.directory / f"{self.name} weights"
        self.weights.mkdir()
        self.run_dir = self.directory / self.name
        self.servers = [Server(self, number) for number in range(2)]

    @property
    def warm_start(self) -> Path:
        """The checkpoint that both runs begin with."""
        (checkpoint,) = (path for path in (self.directory / "warm start").iterdir() if path.is_dir())
        return checkpoint

    @property
    def disturbed(self) -> bool:
        """Whether anything befalls this run."""
        return self.delay_seconds > 0

    def run(self) -> None:
        """Train to the end, in as many sessions as it takes."""
        started = time.monotonic()
        try:
            for server in self.servers:
                server.start()
            self._sessions(serve_http(self.judge))
        finally:
            for server in self.servers:
                server.kill()
        print(f"{self.name}: {self.sessions} session(s), {time.monotonic() - started:.0f} s", flush=True)

    def _sessions(self, judge: str) -> None:
        while True:
            self.sessions += 1
            finished = subprocess.run(self.command(judge), capture_output=True, text=True, env=environment())
            if finished.returncode == 0:
                return
            if self.sessions > 1 or "RolloutUnavailable" in finished.stderr or "no completions" not in finished.stderr:
                sys.exit(f"{self.name}, session {self.sessions}:\n{finished.stderr[-3000:]}")
            self.happened.append(f"  the run stopped: {finished.stderr.strip().splitlines()[-1][:150]}")
            for server in self.servers:
                if not server.is_running:
                    server.start()

    def command(self, judge: str) -> list[str]:
        """The train command."""
        return [
            sys.executable,
            str(ROOT / "examples" / "train_mapo.py"),
            f"data.corpus_dir={self.corpus}",
            f"exp_manager.explicit_log_dir={self.run_dir}",
            "exp_manager.resume_if_exists=true",
            "exp_manager.create_tensorboard_logger=false",
            f"warm_start.cache_dir={self.directory / 'warm start'}",
            "warm_start.stages=[{target: reasoning, truth_share: 1.0, steps: 80, batch_size: 32}]",
            "trainer.num_threads=1",
            f"trainer.mapo.max_steps={STEPS}",
            "trainer.mapo.val_check_interval=0",
            f"trainer.mapo.save_interval={STEPS}",
            "data.test_ds=null",
            f"trainer.mapo.num_rollouts_per_prompt={GROUP}",
            "model.global_batch_size=32",
            "rollout=server",
            f"rollout.server.urls=[{','.join(server.url for server in self.servers)}]",
            f"rollout.server.sync_dir={self.weights}",
            "rollout.server.max_attempts=4",
            "rewards=judge",
            f"rewards.judge.base_url={judge}/v1",
            "rewards.judge.model=judge",
        ]

    def is_to_die(self, server: Server, path: str, body: bytes) -> bool:
        """Whether the server that has just got this request is killed now; each fault of the plan happens once."""
        asked = json.loads(body) if body else {}
        with self._lock:
            if path == "/v1/weights" and "version" in asked:
                self.version = asked["version"]
                if self.sessions > 1 and self.version not in self.second_session:
                    self.second_session.append(self.version)
                return self._falls_due(UPDATING, server, server.number == 1, "in the middle of an update")
            if path == "/v1/chat/completions":
                generating = self._falls_due(GENERATING, server, server.number == 0, "while it generated")
                return generating or self._falls_due(ALONE, server, True, "while it generated, as the other one")
        return False

    def _falls_due(self, step: int, server: Server, hit: bool, how: str) -> bool:
        key = step * 2 + server.number
        if not (self.disturbed and hit and self.version == step * PER_STEP and key not in self._done):
            return False
        self._done.add(key)
        self.happened.append(f"step {step + 1}: rollout server {server.number} killed {how}")
        if step != ALONE:
            # A new one in its place; it has no weights until the next update.
            self._replacing = threading.Thread(target=self._replace, args=(server,), daemon=True)
            self._replacing.start()
        return True

    def _replace(self, server: Server) -> None:
        while server.is_running:
            time.sleep(0.01)
        server.start()

    def wait_for_replacements(self) -> None:
        """Return when the server that was last killed is back."""
        replacing = self._replacing
        if replacing is not None:
            replacing.join()

    def judge(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes] | None:
        """YES or NO by the digest of what is asked; gone for a while from its first request of a step on."""
        with self._lock:
            if self.disturbed and self.version == JUDGING * PER_STEP and self._judge_back == 0:
                self._judge_back = time.monotonic() + self.judge_gone_seconds
                self.happened.append(f"step {JUDGING + 1}: the judge gone for {self.judge_gone_seconds:g} s")
            gone = time.monotonic() < self._judge_back
            self.verdicts += not gone
        if gone:
            return None
        word = "YES" if hashlib.sha256(body).digest()[0] % 2 else "NO"
        return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": word}}]}).encode()


def serve_http(
    answer: Callable[[str, str, dict[str, str], bytes], tuple[int, bytes] | None],
) -> str:
    """Serve a function over HTTP on loopback; returns the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._handle("GET")

        def do_POST(self) -> None:
            self._handle("POST")

        def _handle(self, method: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply = answer(method, self.path, dict(self.headers), body)
            if reply is None:
                self.close_connection = True
                self.connection.close()
                return
            self.send_response(reply[0])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply[1])))
            self.end_headers()
            self.wfile.write(reply[1])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that hung up is a part of the plan."""

    http_server = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{http_server.server_port}"


def report(disturbed: Stage, undisturbed: Stage, *, check: bool) -> None:
    """What happened, and whether the run ended as the other."""
    print(f"every answer of a rollout server {disturbed.delay_seconds:g} s later")
    for line in disturbed.happened:
        print(line)
    planned = [
        f"step {GENERATING + 1}: rollout server 0 killed while it generated",
        f"step {UPDATING + 1}: rollout server 1 killed in the middle of an update",
        f"step {JUDGING + 1}: the judge gone for {disturbed.judge_gone_seconds:g} s",
        *(f"step {ALONE + 1}: rollout server {one} killed while it generated, as the other one" for one in range(2)),
    ]
    start, end, other_end = (weights(path) for path in (disturbed.warm_start, disturbed.run_dir, undisturbed.run_dir))
    figures = records(disturbed.run_dir)
    steps = [record["step"] for record in figures]
    mismatch = max(record["rollout/log_prob_mismatch"] for record in figures)
    versions = list(range(ALONE * PER_STEP, STEPS * PER_STEP, PER_STEP))
    results = {
        "all of the plan happened, and nothing else": sorted(disturbed.happened[:-1]) == planned,
        f"the run went on after step {ALONE}, where it had stopped": disturbed.second_session == versions
        and steps == list(range(1, STEPS + 1)),
        f"the judge was asked in both runs ({undisturbed.verdicts} verdicts)": undisturbed.verdicts > 0,
        "no verdict is missing": not any(record["rollout/verdicts_missing"] for record in figures),
        f"log-probs of servers and training agree in every step ({mismatch:.1g} nats)": mismatch < MISMATCH_NATS,
        "same samples and rewards, where they are written": samples(disturbed.run_dir) == samples(undisturbed.run_dir),
        "the weights moved, to the same in both runs, bit for bit": equal(end, other_end) and not equal(start, end),
    }
    for what, holds in results.items():
        print(f"{'yes' if holds else 'NO':<4}{what}")
    if check and not all(results.values()):
        sys.exit("the disturbed run did not end as the other one")


def weights(path: Path) -> list[torch.Tensor]:
    """All tensors of a run's last checkpoint, or of a checkpoint."""
    is_run = (path / "config.yaml").is_file()
    config = read_run_config(path if is_run else path.parents[1] / "disturbed")
    policy = build_policy(config, load_tokenizer(config.data.tokenizer))
    load_checkpoint(find_checkpoint(path, None) if is_run else path, policy)
    return [value for value in policy.state_dict().values() if isinstance(value, torch.Tensor)]


def equal(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(one, other) for one, other in zip(tensors, others, strict=True))


def samples(run_dir: Path) -> list[dict[str, Any]]:
    """What rollouts.jsonl says that was drawn and how it was rewarded."""
    wanted = ("step", "id", "text", "reward", "weight_version")
    lines = (run_dir / "rollouts.jsonl").read_text().splitlines()
    return [{name: json.loads(line)[name] for name in wanted} for line in lines]


def records(run_dir: Path) -> list[dict[str, float]]:
    """Figures of the steps."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


def environment() -> dict[str, str]:
    """One thread each, and no proxy but ours."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1"}


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=2.0, help="seconds of each answer (default: %(default)s)")
    parser.add_argument(
        "--judge-gone", type=float, default=60.0, help="seconds that the judge is away (default: %(default)s)"
    )
    parser.add_argument("--keep", help="directory for the runs, which stay there (default: a temporary one)")
    parser.add_argument("--check", action="store_true", help="fail where the runs end differently")
    return parser.parse_args()


if __name__ == "__main__":
    hide_cuda_devices()
    install_cpu_host()
    initialize_parallel()
    main()
