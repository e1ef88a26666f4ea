"""What `make demo` runs: synthetic corpus, warm start, MAPO training, test, report, and a five-line summary."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from nemo_mapo.reports.summary import summary_lines

HERE = Path(__file__).parent
PROCESSES = min(2, os.cpu_count() or 1)
"""Data-parallel, with one thread each: with a model this small, faster than one process with two threads."""


def main() -> None:
    """Run the steps one after the other; each is skipped or resumed if it ran before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs/demo", help="run directory (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="overrides for train_mapo.py, e.g. trainer.mapo.max_steps=20")
    arguments = parser.parse_args()
    started = time.monotonic()
    step("corpus", [], "make_synthetic_corpus.py", "--output", "data/synthetic")
    together = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    step(
        "warm start, training, test",
        together if PROCESSES > 1 else [],
        "train_mapo.py",
        f"exp_manager.explicit_log_dir={arguments.output}",
        "exp_manager.resume_if_exists=true",
        f"trainer.devices={PROCESSES}",
        f"model.micro_batch_size={32 // PROCESSES}",
        "trainer.num_threads=1",
        *arguments.overrides,
    )
    print()
    for line in summary_lines(Path(arguments.output)):
        print(line)
    print(f"\nreport: {Path(arguments.output, 'report.html').resolve()}")
    print(f"(demo took {(time.monotonic() - started) / 60:.1f} minutes without installation)")


def step(title: str, launcher: list[str], script: str, *arguments: str) -> None:
    """Run one of our scripts; end the demo with its exit status if it fails."""
    print(f"== {title}", flush=True)
    finished = subprocess.run([sys.executable, *launcher, HERE / script, *arguments], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


if __name__ == "__main__":
    main()
