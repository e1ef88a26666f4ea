"""The files of a run directory that are appended to while a run goes on."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_mapo.files import write_text
from nemo_mapo.processes import is_main_rank
from nemo_mapo.reports.report import write_report


class JsonLines:
    """A file with one JSON object per line, each with a `step`; only the main rank writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write whole lines and flush them to disk."""
        if not is_main_rank():
            return
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        with self.path.open("a") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All complete records; a last line that was truncated during writing is skipped."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def last_step(self) -> int:
        """The last recorded step; -1 if nothing is recorded."""
        return max((int(record["step"]) for record in self.read()), default=-1)

    def forget_after(self, step: int) -> None:
        """Drop records later than `step`, and a last line that was truncated while it was written.

        A resumed run writes those steps again.
        """
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines(keepends=True) if _is_kept(line, step)]
        write_text(self.path, "".join(kept))


def _is_kept(line: str, step: int) -> bool:
    if not line.endswith("\n"):
        return False
    return int(json.loads(line)["step"]) <= step


class JsonLinesLogger:
    """metrics.jsonl in the shape that NeMo-Aligner's logger wrapper calls."""

    def __init__(self, file: JsonLines) -> None:
        self.file = file

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """One flat object per step, keys sorted.

        Raises:
            ValueError: naming a metric that is NaN or infinite.
        """
        wrong = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        if wrong:
            raise ValueError(f"step {step}: {', '.join(wrong)} is not a finite number")
        self.file.append([{"step": step, **{key: metrics[key] for key in sorted(metrics)}}])

    def finalize(self, status: str) -> None:
        """Nothing is buffered."""


class LivePage:
    """Writes the report at every validation, in the shape that NeMo-Aligner's logger wrapper calls."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """The metrics are already in the files: this logger comes last."""
        if any(name.startswith("val/") for name in metrics):
            write_report(self.run_dir)

    def finalize(self, status: str) -> None:
        """The report of the finished run is written with its test."""
