"""The synthetic corpus in the formats of users' own data: questions as JSON lines, the test split as a benchmark."""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from nemo_mapo.data.manifests import load_cuts
from nemo_mapo.data.splits import SPLITS, manifest_path
from nemo_mapo.embedded.synthetic_text import TASKS
from nemo_mapo.files import write_text

BENCHMARK_FILE = "benchmark/test.json"
"""In its own folder, so that an importer of the questions does not read it as more of them."""


def export_questions(corpus: Path, output: Path) -> list[Path]:
    """Write `<task>/<split>.jsonl` (audio/question/choices/answer) and the test split as MMAU's file; return the files.

    Each task is a corpus of its own for examples/prepare_data.py. Audio is not copied but named by absolute path.

    Raises:
        ValueError: a manifest of the corpus is damaged.
    """
    questions = {split: list(_questions(manifest_path(corpus, split))) for split in SPLITS}
    texts = {BENCHMARK_FILE: json.dumps([_benchmark_item(row) for row in questions["test"]], indent=1)}
    for task, (split, rows) in product(TASKS, questions.items()):
        texts[f"{task}/{split}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows if row["task"] == task)
    return [write_text(output / name, text) for name, text in texts.items()]


def _questions(manifest: Path) -> Iterator[dict[str, Any]]:
    for cut in load_cuts(manifest):
        (source,) = cut.recording.sources
        text = {name: cut.custom[name] for name in ("question", "choices", "answer", "task", "reasoning", "caption")}
        yield {"id": cut.id, "audio": str(Path(source.source).absolute()), **text}


def _benchmark_item(question: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": question["id"],
        "audio_id": question["audio"],
        "question": question["question"],
        "choices": question["choices"],
        "answer": question["answer"],
        "task": "sound",
        "difficulty": "easy",
        "category": "synthetic",
        "sub-category": question["task"],
    }
