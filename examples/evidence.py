"""Does MAPO help? Every variant on every task with paired seeds, on the test split: the tables of docs/evidence.md.

Settings were fixed before the test split was read; no seed is dropped, and unfinished runs are named. Finished runs are
skipped and interrupted ones resumed, so the command can be repeated until all are finished.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ablation import Job, run_one
from tqdm import tqdm

from nemo_mapo.console import quiet_upstream
from nemo_mapo.platform import hide_cuda_devices

hide_cuda_devices()
quiet_upstream()

from nemo_mapo.config.analysis import AnalysisConfig  # noqa: E402
from nemo_mapo.config.load import ConfigError  # noqa: E402
from nemo_mapo.embedded.prior_shift import PriorShiftConfig, prior_shift_recipe  # noqa: E402
from nemo_mapo.embedded.synthetic import SyntheticCorpusConfig, recipe, write_recipe  # noqa: E402
from nemo_mapo.embedded.warm_start import start_embedded  # noqa: E402
from nemo_mapo.evaluation.grounding.measure import measure_run  # noqa: E402
from nemo_mapo.evaluation.grounding.run import START  # noqa: E402
from nemo_mapo.platform import initialize_parallel, install_cpu_host  # noqa: E402
from nemo_mapo.reports.evidence import EvidenceRun, evidence_markdown  # noqa: E402
from nemo_mapo.reports.markdown import fill  # noqa: E402

CORPORA = {
    "synthetic": recipe(SyntheticCorpusConfig()),
    "synthetic_prior_shift": prior_shift_recipe(PriorShiftConfig()),
}
TASKS = {"synthetic": (), "synthetic_prior_shift": ("data=synthetic_prior_shift", "warm_start=prior_shift")}
ANSWER_WORDS = "objective.gate_words=[yes,no]"
VARIANTS = {
    "grpo": ("objective=grpo",),
    "mask_only": ("objective=mask_only",),
    "attention_only": ("objective=attention_only",),
    "mapo": ("objective=mapo",),
    "mapo_eta_0.5": ("objective=mapo", "objective.eta=0.5"),
    "mapo_kl": ("objective=mapo", "objective.signal=kl", ANSWER_WORDS),
    "mapo_jsd": ("objective=mapo", "objective.signal=jsd", ANSWER_WORDS),
    "mapo_log_ratio": ("objective=mapo", "objective.signal=log_ratio", ANSWER_WORDS),
}
LATE_AFTER = "."
"""Tokens after the first sentence, which describes the clip, are late."""


def job(task: str, variant: str, seed: int, arguments: argparse.Namespace) -> Job:
    """A training run; its seed fixes question order and sampling for every variant, and all share one start policy."""
    run_dir = arguments.output / task / f"{variant}-seed{seed}"
    steps = arguments.steps
    of_run = [f"seed={seed}", f"data.train_ds.seed={seed}", "trainer.num_threads=1", f"trainer.mapo.max_steps={steps}"]
    of_run += [f"trainer.mapo.val_check_interval={steps}", f"trainer.mapo.save_interval={steps}"]
    of_run += [f"data.test_ds.max_samples={arguments.items}", f"exp_manager.explicit_log_dir={run_dir}"]
    return Job(variant, seed, run_dir, (*TASKS[task], *VARIANTS[variant], *of_run, *arguments.overrides))


def measured(run_dir: Path, checkpoint: str | None, *, missing_too: bool) -> Path | None:
    """The measurements of a run's newest checkpoint or its start, which are made if missing and `missing_too`."""
    there = [
        path for path in (run_dir / "evidence").glob("*-test.json") if (START in path.name) == (checkpoint == START)
    ]
    if there or not missing_too:
        return there[0] if there else None
    config = AnalysisConfig(late_after=LATE_AFTER)
    return measure_run(run_dir, checkpoint, split="test", config=config, warm_starter=start_embedded)


def main() -> None:
    """Run and measure what is missing, then write the page."""
    arguments = _arguments()
    jobs = {
        (task, one.variant, one.seed): one
        for task in arguments.tasks
        for seed in arguments.seeds
        for one in (job(task, variant, seed, arguments) for variant in arguments.variants)
    }
    try:
        for one in jobs.values():
            one.config()
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    if not arguments.table_only:
        for task in arguments.tasks:
            write_recipe(CORPORA[task], Path("data", task))
        missing = [one for one in jobs.values() if not one.is_finished()]
        with tqdm(total=len(missing), desc="evidence", unit="run") as bar, ThreadPoolExecutor(arguments.jobs) as pool:
            for _ in pool.map(run_one, missing):
                bar.update()
        install_cpu_host()
        initialize_parallel()
    runs, starts = [], {}
    for (task, variant, seed), one in jobs.items():
        finished = one.run_dir.is_dir() and one.is_finished()
        found = measured(one.run_dir, None, missing_too=not arguments.table_only) if finished else None
        if one.run_dir.is_dir():
            runs.append(EvidenceRun(task=task, variant=variant, seed=seed, measured=found, run_dir=one.run_dir))
        if finished and task not in starts:
            start = measured(one.run_dir, START, missing_too=not arguments.table_only)
            starts |= {} if start is None else {task: start}
    table = evidence_markdown(runs, starts)
    print(table)
    if arguments.page is not None:
        fill(arguments.page, "evidence", table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/evidence"), help="directory for the runs (default: %(default)s)"
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="(default: all)")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="(default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="(default: 1 2 3 4 5)")
    parser.add_argument("--steps", type=int, default=30, help="rollout batches per run (default: %(default)s)")
    parser.add_argument("--items", type=int, default=300, help="questions of the test split (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="parallel runs (default: cores)")
    parser.add_argument("--table-only", action="store_true", help="only tabulate finished runs")
    parser.add_argument("--page", type=Path, help="also write the tables between the markers of this page")
    parser.add_argument("overrides", nargs="*", help="overrides for every run, after --")
    return parser.parse_args()


if __name__ == "__main__":
    main()
