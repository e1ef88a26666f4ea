"""GRPO, mask only, attention only, full MAPO and sharper masks x seeds: one table, one page.

The task is the embedded one unless the overrides name another (data=prepared data.prepared_dir=DIR
hydra.searchpath=[MODEL/conf] model=imported ...). Every run is an ordinary training run. Finished runs are skipped and
interrupted ones resumed, so you can repeat the command until all are finished.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nemo_mapo.config.command_line import end_with
from nemo_mapo.config.compose import compose
from nemo_mapo.config.load import ConfigError, load
from nemo_mapo.config.run import RunConfig
from nemo_mapo.config.yaml_files import read_recorded

HERE = Path(__file__).parent
VARIANTS = ("grpo", "mask_only", "attention_only", "mapo", "mapo_sharp")


@dataclass(frozen=True)
class Job:
    """One training run of the ablation."""

    variant: str
    seed: int
    run_dir: Path
    overrides: tuple[str, ...]

    def is_finished(self) -> bool:
        """Whether it has test results; exits if the directory holds a run of another config."""
        summary, config = self.run_dir / "run.json", self.run_dir / "config.yaml"
        if not summary.is_file() or "test" not in json.loads(summary.read_text()):
            return False
        from nemo_mapo.training.run_directory import config_changes, recorded_config

        changed = config_changes(read_recorded(config), recorded_config(self.config()), length_too=True)
        if changed:
            sys.exit(f"{self.run_dir} holds a run of another config; choose another --output:\n" + "\n".join(changed))
        return True

    def config(self) -> RunConfig:
        """Its config; ConfigError if it cannot be run."""
        return load(compose(HERE.parent / "conf" / "train_mapo.yaml", self.overrides), RunConfig)

    def command(self) -> list[str]:
        """An ordinary training run, resumed if it was started before."""
        return [sys.executable, str(HERE / "train_mapo.py"), *self.overrides, "exp_manager.resume_if_exists=true"]


def job(variant: str, seed: int, output: Path, overrides: list[str]) -> Job:
    """A seed fixes question order and sampling for every variant; all variants share one start policy."""
    run_dir = output / f"{variant}-seed{seed}"
    of_run = [f"objective={variant}", f"seed={seed}", f"data.train_ds.seed={seed}", "trainer.num_threads=1"]
    return Job(variant, seed, run_dir, (*of_run, f"exp_manager.explicit_log_dir={run_dir}", *overrides))


def main() -> None:
    """Run what is missing, then write table and page."""
    arguments = parse_arguments()
    output = Path(arguments.output)
    jobs = [
        job(variant, seed, output, arguments.overrides) for seed in arguments.seeds for variant in arguments.variants
    ]
    try:
        for one in jobs:
            one.config()
    except ConfigError as error:
        end_with(error)
    from nemo_mapo.reports.compare import AblationRun, write_comparison
    from nemo_mapo.reports.readme import update_readme

    if not arguments.table_only:
        if not any(override.startswith("data=") for override in arguments.overrides):
            corpus = [sys.executable, HERE / "make_synthetic_corpus.py", "--output", "data/synthetic"]
            subprocess.run(corpus, check=True)
        run_all([job for job in jobs if not job.is_finished()], arguments.jobs)
    finished = [job for job in jobs if job.is_finished()]
    if not finished:
        sys.exit(f"no finished run below {output}")
    rows = [AblationRun(variant=job.variant, seed=job.seed, run_dir=job.run_dir) for job in finished]
    page = write_comparison(rows, output)
    if arguments.readme is not None:
        update_readme(Path(arguments.readme), rows)
    print((output / "comparison.md").read_text())
    print(f"{len(finished)} of {len(jobs)} runs; page: {page}")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/ablation", help="directory for the runs (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME",
                        help=f"any of {', '.join(VARIANTS)} (default: all)")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="parallel runs (default: cores)")
    parser.add_argument("--table-only", action="store_true", help="only tabulate finished runs")
    parser.add_argument("--readme", help="also write table and figure into this README")
    parser.add_argument("overrides", nargs="*", help="overrides for every run, after --")
    return parser.parse_args()


def run_all(jobs: list[Job], at_a_time: int) -> None:
    """Train; the first run that needs the warm start trains it, and the others wait for it."""
    with tqdm(total=len(jobs), desc="ablation", unit="run") as bar, ThreadPoolExecutor(at_a_time) as pool:
        for _ in pool.map(run_one, jobs):
            bar.update()


def run_one(job: Job) -> None:
    """Train one run with its output in its directory; stop the ablation if it fails."""
    job.run_dir.mkdir(parents=True, exist_ok=True)
    log = job.run_dir / "console.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        finished = subprocess.run(job.command(), stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    if finished.returncode:
        raise RuntimeError(f"{job.variant}, seed {job.seed} failed; see {log}")


if __name__ == "__main__":
    main()
