"""Spoken digits, held-out speakers: a supervised start from scratch, then MAPO against it; prints the table.

Each seed puts other speakers into train, validation and test, and seeds the runs. What is finished is not run again, so
the command goes on where it was interrupted. Takes a quarter of an hour a seed on one idle core.

    python benchmarks/spoken_digits.py --recordings free-spoken-digit-dataset/recordings --output runs/digits
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_mapo.statistics import Estimate, compare_paired, estimate, share_interval

ROOT = Path(__file__).resolve().parents[1]
MODEL = ("model.perception.downsampling=2", "data.prompt.instruction=null", "rollout.sampling.max_new_tokens=40",
         "trainer.num_threads=1")  # fmt: skip
SFT = ("model.from_scratch=true", "data.test_ds=null")
MAPO = ("data.train_ds.batch_size=32", "trainer.mapo.num_rollouts_per_prompt=4", "model.optim.lr=1e-4", "~warm_start")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One seed, on all questions of its test speaker."""

    seed: int
    speaker: str
    start: list[float]
    end: list[float]
    """Whether each question is right, before and after MAPO."""
    start_silent: list[float]
    end_silent: list[float]
    start_format: float
    """On the validation speaker."""
    end_format: float


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, required=True, help="the .wav files")
    parser.add_argument("--output", type=Path, required=True, help="directory of corpora and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sft-steps", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--mapo-steps", type=int, default=40, help="more than before continues (default: %(default)s)")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        _run_seed(seed, arguments)
    print(table([read_outcome(arguments.output / f"seed_{seed}", seed) for seed in arguments.seeds]))


def _run_seed(seed: int, arguments: argparse.Namespace) -> None:
    place, questions = arguments.output / f"seed_{seed}", arguments.output / "questions.csv"
    if not questions.is_file():
        _example("spoken_digits.py", arguments.recordings, questions)
    if not (place / "data").is_dir():
        _example(
            *("prepare_data.py", "multiple_choice", "--input", questions, "--output", place / "data"),
            *("--resample", 16000, "--group-by", "speaker", "--shares", 0.67, 0.165, 0.165),
            *("--tokenizer", "train", "--seed", seed),
        )
    data = ("data=prepared", f"data.prepared_dir={place / 'data'}", f"seed={seed}", f"data.train_ds.seed={seed}")
    taught, trained = place / "sft", place / "mapo"
    start = _checkpoint(taught, arguments.sft_steps)
    if not start.is_dir():
        _example("sft.py", *data, *MODEL, *SFT, f"trainer.sft.max_steps={arguments.sft_steps}", *_log(taught))
    if "test" not in _summary(trained) or not _checkpoint(trained, arguments.mapo_steps).is_dir():
        begin = (f"pretrained_checkpoint.restore_from_path={start}", f"trainer.mapo.max_steps={arguments.mapo_steps}")
        _example("train_mapo.py", *data, *MODEL, *MAPO, *begin, *_log(trained))


def _example(script: str, *arguments: object) -> None:
    subprocess.run([sys.executable, str(ROOT / "examples" / script), *map(str, arguments)], check=True)


def _log(run: Path) -> list[str]:
    again = ["exp_manager.resume_if_exists=true"] if run.is_dir() else []
    return [f"exp_manager.explicit_log_dir={run}", *again]


def _checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:06d}"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _summary(run: Path) -> dict[str, Any]:
    path = run / "run.json"
    facts: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return facts


def read_outcome(place: Path, seed: int) -> Outcome:
    """What the runs of a seed came to."""
    tested = _lines(place / "mapo" / "test.jsonl")
    test = [one for one in tested if one["step"] == max(one["step"] for one in tested)]
    column = {
        name: [float(one[name]) for one in test] for name in ("start_correct", "correct", "start_silent", "silent")
    }
    (speaker,) = {one["id"].split("_")[1] for one in test}
    return Outcome(
        seed=seed,
        speaker=speaker,
        start=column["start_correct"],
        end=column["correct"],
        start_silent=column["start_silent"],
        end_silent=column["silent"],
        start_format=[one["val/format"] for one in _lines(place / "sft" / "metrics.jsonl") if "val/format" in one][-1],
        end_format=_summary(place / "mapo")["test"]["format"],
    )


def table(outcomes: list[Outcome]) -> str:
    """A line per seed, Wilson's intervals in brackets, and the means over seeds with t-intervals."""
    columns = ("seed", "test speaker", "questions", "SFT, %", "after MAPO, %", "gain, points", "silent: SFT, %",
               "silent: MAPO, %", "format: SFT, MAPO, %")  # fmt: skip
    head = f"| {' | '.join(columns)} |"
    lines = [head, "|---:|---|---:|---:|---:|---:|---:|---:|---:|"]
    for one in outcomes:
        gain = compare_paired(one.end, one.start, samples=10000, seed=0, confidence=0.95).difference
        lines.append(
            f"| {one.seed} | {one.speaker} | {len(one.end)} | {_share(one.start)} | {_share(one.end)} | "
            f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] | {_share(one.start_silent)} | "
            f"{_share(one.end_silent)} | {100 * one.start_format:.1f}, {100 * one.end_format:.1f} |"
        )
    means = {
        name: [_mean(vars(one)[name]) for one in outcomes] for name in ("start", "end", "start_silent", "end_silent")
    }
    gains = [end - start for start, end in zip(means["start"], means["end"], strict=True)]
    cells = [_over_seeds(estimate(means[name], "share")) for name in ("start", "end")]
    cells += [_over_seeds(estimate(gains, "difference"), signed=True)]
    cells += [_over_seeds(estimate(means[name], "share")) for name in ("start_silent", "end_silent")]
    lines.append(f"| mean | | | {' | '.join(cells)} | |")
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _share(values: list[float]) -> str:
    found = share_interval(round(sum(values)), len(values))
    return f"{100 * found.mean:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _over_seeds(found: Estimate | None, *, signed: bool = False) -> str:
    assert found is not None
    sign = "+" if signed else ""
    ends = (
        ""
        if found.low is None or found.high is None
        else f" [{100 * found.low:{sign}.1f}, {100 * found.high:{sign}.1f}]"
    )
    return f"{100 * found.mean:{sign}.1f}{ends}"


if __name__ == "__main__":
    main()
