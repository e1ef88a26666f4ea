"""Steps per hour with generation one batch ahead and without: `python benchmarks/async_rollouts.py`.

Trainer and vLLM are processes of one thread each, as in `python examples/train_mapo.py rollout=vllm`;
both ways make the same number of completions of the same length. Runs alternate; the ratio is the median over pairs.
The first two steps of a run are left out: one warms up, and the other was not overlapped.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_mapo.embedded.synthetic import SyntheticCorpusConfig, write_corpus
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.rollout.vllm.process import free_port

ROOT = Path(__file__).parents[1]
WANTED = 1.4
LEFT_OUT = 2
STALENESS = {"synchronous": 0, "one_ahead": 1}
"""Batches by which the weights sampled from lag behind, by `trainer.mapo.generation.type`."""


def main() -> None:
    """Time pairs of runs and print a table; with --check fail below the wanted ratio."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        corpus = directory / "corpus"
        prompts = arguments.prompts * (arguments.steps + 1)
        write_corpus(SyntheticCorpusConfig(train=prompts, validation=4, test=4), corpus, progress=False)
        build_tokenizer().save_pretrained(corpus / "tokenizer")
        with serving(directory, arguments) as url:
            pairs = [
                {name: train(name, directory / f"{name} {pair}", url, arguments) for name in STALENESS}
                for pair in range(arguments.pairs)
            ]
    report(pairs, check=arguments.check)


def train(name: str, run_dir: Path, url: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One run; its median seconds of a step, of waiting for completions and of the rest."""
    length = arguments.tokens
    command = [
        sys.executable,
        str(ROOT / "examples" / "train_mapo.py"),
        "~warm_start",
        "model.from_scratch=true",
        "trainer.num_threads=1",
        "trainer.mapo.val_check_interval=0",
        "trainer.mapo.save_interval=0",
        f"trainer.mapo.max_steps={arguments.steps}",
        f"trainer.mapo.num_rollouts_per_prompt={arguments.group}",
        f"trainer.mapo.generation.type={name}",
        "objective.behaviour_clip=2",
        *model_overrides(run_dir.parent),
        f"data.train_ds.batch_size={arguments.prompts}",
        f"model.global_batch_size={arguments.prompts * arguments.group // 2}",
        f"exp_manager.explicit_log_dir={run_dir}",
        "exp_manager.create_tensorboard_logger=false",
        "rollout=vllm",
        f"rollout.vllm.urls=[{url}]",
        f"rollout.sampling.min_new_tokens={length}",
        f"rollout.sampling.max_new_tokens={length}",
    ]
    run(command)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][LEFT_OUT:]
    assert {record["rollout/staleness"] for record in records} == {STALENESS[name]}
    assert {record["rollout/completion_tokens"] for record in records} == {length}
    seconds = [record["timing/step_seconds"] for record in records]
    waited = [record["timing/rollout_seconds"] for record in records]
    return {"step": statistics.median(seconds), "wait": statistics.median(waited)}


@contextmanager
def serving(directory: Path, arguments: argparse.Namespace) -> Iterator[str]:
    """vLLM; yields its address."""
    port = free_port()
    command = [
        sys.executable,
        str(ROOT / "examples" / "serve_vllm.py"),
        *model_overrides(directory),
        "rollout=vllm",
        f"rollout.batch_size={arguments.slots}",
        f"rollout.vllm.python={arguments.python}",
        f"rollout.vllm.port={port}",
        f"exp_manager.explicit_log_dir={directory / 'server'}",
    ]
    log = directory / "vllm.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers(url):
            if process.poll() is not None:
                sys.exit(log.read_text()[-3000:])
            time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def answers(url: str) -> bool:
    """Whether the server takes requests."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


def model_overrides(directory: Path) -> list[str]:
    """What trainer and server have to agree on."""
    return [f"data.corpus_dir={directory / 'corpus'}", "data.test_ds=null"]


def run(command: list[str]) -> None:
    """Run to the end; what went wrong is printed."""
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    if finished.returncode:
        sys.exit(finished.stderr)


def environment() -> dict[str, str]:
    """One thread each, and no proxy between them."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}


def report(pairs: list[dict[str, dict[str, float]]], *, check: bool) -> None:
    """Medians of both, and of their ratio."""
    print(f"{'':<12}{'steps/h':>9}{'step s':>9}{'waited for completions s':>26}")
    for name in STALENESS:
        step, wait = (statistics.median(pair[name][part] for pair in pairs) for part in ("step", "wait"))
        print(f"{name:<12}{3600 / step:>9.0f}{step:>9.2f}{wait:>26.2f}")
    ratios = sorted(pair["synchronous"]["step"] / pair["one_ahead"]["step"] for pair in pairs)
    ratio = statistics.median(ratios)
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}, {len(pairs)} pairs"
    print(f"steps per hour, one_ahead / synchronous: {ratio:.2f} ({spread})")
    if check and ratio < WANTED:
        sys.exit(f"asked for is at least {WANTED:g}")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, meaning in (
        ("prompts", 8, "prompts of a rollout batch"),
        ("group", 8, "completions per prompt"),
        ("tokens", 64, "length of every completion"),
        ("slots", 16, "completions that the server generates together"),
        ("steps", 12, "rollout batches of a run"),
        ("pairs", 3, "runs of each"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument(
        "--python", default=".venv-vllm/bin/python", help="interpreter that has vLLM (default: %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help=f"fail below a ratio of {WANTED:g}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
