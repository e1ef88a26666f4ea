"""Files in the published layouts, with made-up questions."""

import json
from pathlib import Path
from typing import Any

from nemo_mapo.evaluation.benchmarks.items import Benchmark, load_benchmark
from nemo_mapo.evaluation.benchmarks.layouts import LAYOUTS
from nemo_mapo.evaluation.benchmarks.predictions import Prediction

Record = dict[str, Any]


def mmau_record(name: str, **changes: Any) -> Record:
    return {
        "id": name,
        "audio_id": f"./test-mini-audios/{name}.wav",
        "question": "What barks?",
        "choices": ["Dog", "Cat", "Cow", "Owl"],
        "answer": "Dog",
        "dataset": "made-up",
        "task": "sound",
        "split": "test-mini",
        "category": "Reasoning",
        "sub-category": "Acoustic Source Inference",
        "difficulty": "easy",
        **changes,
    }


def mmar_record(name: str, **changes: Any) -> Record:
    return {
        "id": name,
        "audio_path": f"./audio/{name}.wav",
        "question": "Where is this?",
        "choices": ["At sea", "On a train"],
        "answer": "At sea",
        "modality": "mix-sound-speech",
        "category": "Semantic Layer",
        "sub-category": "Content Analysis",
        "language": "en",
        "source": "made-up",
        "url": "",
        "timestamp": "00:00:00,00:00:10",
        **changes,
    }


def mmsu_record(name: str, **changes: Any) -> Record:
    return {
        "id": name,
        "task_name": "gender_recognition",
        "audio_path": f"audio/{name}.wav",
        "question": "Who speaks?",
        "choice_a": None,
        "choice_b": "male",
        "choice_c": None,
        "choice_d": "female",
        "answer_gt": "female",
        "category": "Perception",
        "sub-category": "Paralinguistics",
        "sub-sub-category": "Speaker Traits",
        "linguistics_sub_discipline": None,
        **changes,
    }


def mmau_pro_record(name: str, **changes: Any) -> Record:
    return {
        "id": name,
        "audio_path": [f"data/{name}.wav"],
        "question": "What is prepared?",
        "choices": ["Tea", "Soup", "Bread"],
        "answer": "Tea",
        "length_type": "short",
        "perceptual_skills": ["Source", "Texture"],
        "reasoning_skills": [],
        "category": "sound",
        "transcription": None,
        "task_classification": None,
        "task_identifier": None,
        "kwargs": None,
        "sub-cat": None,
        **changes,
    }


def instruction_record(name: str, rule: str, arguments: Record, **changes: Any) -> Record:
    return mmau_pro_record(
        name, category="instruction following", choices=None, answer=None, task_identifier=rule, kwargs=arguments,
        **changes,
    )  # fmt: skip


def open_record(name: str, **changes: Any) -> Record:
    return mmau_pro_record(name, category="open", choices=[], answer="Somebody makes tea.", **changes)


def write_json(path: Path, records: list[Record]) -> Path:
    path.write_text(json.dumps(records))
    return path


def loaded(path: Path, layout: str, records: list[Record], **options: Any) -> Benchmark:
    """Write the records and read them as a benchmark."""
    return load_benchmark(write_json(path, records), LAYOUTS[layout], **options)


def answers(**texts: str) -> dict[str, Prediction]:
    """Predictions that are nothing but an answer."""
    return {name: Prediction(id=name, completion=text) for name, text in texts.items()}
