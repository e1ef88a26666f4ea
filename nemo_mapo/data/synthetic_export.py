"""The synthetic corpus in the files that users bring: questions as JSON lines, a test split as a benchmark."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_mapo.data.manifests import load_cuts
from nemo_mapo.data.synthetic import SPLITS, manifest_path

BENCHMARK_FILE = "benchmark/test.json"
"""In a folder of its own: an importer of the questions must not take it for more of them."""


def export_questions(corpus: Path, output: Path) -> list[Path]:
    """Write `<split>.jsonl` (audio/question/choices/answer) and the test split in MMAU's layout; return the files.

    Audio stays in the corpus and is named by absolute path.

    Raises:
        ValueError: a manifest of the corpus is damaged.
    """
    (output / BENCHMARK_FILE).parent.mkdir(parents=True, exist_ok=True)
    questions = {split: list(_questions(manifest_path(corpus, split))) for split in SPLITS}
    lines = {f"{split}.jsonl": "".join(json.dumps(row) + "\n" for row in rows) for split, rows in questions.items()}
    lines[BENCHMARK_FILE] = json.dumps([_benchmark_item(row) for row in questions["test"]], indent=1)
    for name, text in lines.items():
        partial = output / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(output / name)
    return [output / name for name in lines]


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
