"""The directory of one evaluation: predictions that a restart continues from, judgements, results."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from nemo_mapo.config.load import differences
from nemo_mapo.config.yaml_files import read_recorded
from nemo_mapo.evaluation.benchmarks.items import Benchmark
from nemo_mapo.evaluation.benchmarks.predictions import COMPLETION, Prediction, read_predictions
from nemo_mapo.evaluation.benchmarks.tables import Results
from nemo_mapo.files import write_text
from nemo_mapo.training.records import JsonLines

_MAY_CHANGE = ("output_dir", "num_threads", "rollout.batch_size", "judge", "statistics", "benchmark.closed_rule")
"""Keys that do not affect the model's answers."""


class EvaluationDirectory:
    """Paths and files of an evaluation.

    `evaluation.yaml` says what made the predictions; they are appended to `predictions.jsonl` batch by batch.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "evaluation.yaml"
        self.predictions = path / "predictions.jsonl"
        self.judgements = path / "judgements.jsonl"

    @contextmanager
    def opened(self, settings: dict[str, Any]) -> Iterator[None]:
        """Keep other processes out, and refuse predictions that were made with other settings.

        Raises:
            ValueError: another process works here, the directory cannot be written, or it holds the predictions of
                another evaluation.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", timeout=0)
            lock.acquire()
        except Timeout as error:
            raise ValueError(f"output_dir={self.path}: another evaluation is running there; wait for it") from error
        except OSError as error:
            raise ValueError(f"output_dir={self.path}: cannot write there ({error.strerror})") from error
        try:
            self._check(settings)
            write_text(self.settings, yaml.safe_dump(settings, sort_keys=False))
            yield
        finally:
            lock.release()

    def read(self, benchmark: Benchmark) -> dict[str, Prediction]:
        """The predictions so far; a line that was truncated while it was written is dropped."""
        if not self.predictions.exists():
            return {}
        whole, newline, tail = self.predictions.read_text().rpartition("\n")
        if tail:
            write_text(self.predictions, whole + newline)
        return read_predictions(self.predictions, benchmark, field=COMPLETION)

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Write a batch of predictions, flushed to disk."""
        JsonLines(self.predictions).append(prediction.record() for prediction in predictions)

    def write_results(self, results: Results) -> None:
        """Write results.json and results.md, each atomically."""
        self.write_json("results.json", results.as_plain())
        write_text(self.path / "results.md", results.markdown())

    def write_json(self, name: str, content: Any) -> Path:
        """Write a JSON file atomically."""
        return write_text(self.path / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def _check(self, settings: dict[str, Any]) -> None:
        if not self.predictions.exists():
            return
        before = read_recorded(self.settings) if self.settings.exists() else {}
        if changed := differences(before, settings, free=_MAY_CHANGE):
            raise ValueError(
                f"output_dir={self.path} holds predictions of another evaluation, so it cannot be continued; set these "
                "back or choose another directory:\n" + "\n".join(f"  {line}" for line in changed)
            )
