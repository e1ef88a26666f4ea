"""What `make demo` runs: synthetic corpus, warm start, MAPO training, test, report, and a five-line summary."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from nemo_mapo.reports.summary import summary_lines

HERE = Path(__file__).parent
THREADS = min(2, os.cpu_count() or 1)
"""On an idle machine two threads save a third of the time of a step; more help little with a model this small."""


def main() -> None:
    """Run the steps one after the other; each is skipped or resumed if it ran before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs/demo", help="run directory (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="overrides for train_mapo.py, e.g. trainer.mapo.max_steps=20")
    arguments = parser.parse_args()
    started = time.monotonic()
    step("corpus", "make_synthetic_corpus.py", "--output", "data/synthetic")
    step(
        "warm start, training, test",
        "train_mapo.py",
        f"exp_manager.explicit_log_dir={arguments.output}",
        "exp_manager.resume_if_exists=true",
        f"trainer.num_threads={THREADS}",
        *arguments.overrides,
    )
    print()
    for line in summary_lines(Path(arguments.output)):
        print(line)
    print(f"\nreport: {Path(arguments.output, 'report.html').resolve()}")
    print(f"(demo took {(time.monotonic() - started) / 60:.1f} minutes without installation)")


def step(title: str, script: str, *arguments: str) -> None:
    """Run one of our scripts; end the demo with its exit status if it fails."""
    print(f"== {title}", flush=True)
    finished = subprocess.run([sys.executable, HERE / script, *arguments], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


if __name__ == "__main__":
    main()
