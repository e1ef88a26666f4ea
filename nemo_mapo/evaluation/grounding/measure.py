"""The per-question measurements by which `make evidence` compares variants: one file per checkpoint."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nemo_mapo.config.analysis import AnalysisConfig
from nemo_mapo.data.manifests import example_id, load_cuts
from nemo_mapo.evaluation.evaluate import captured
from nemo_mapo.evaluation.grounding.analyse import Found, Subject, add_causal
from nemo_mapo.evaluation.grounding.causal import parts_of
from nemo_mapo.evaluation.grounding.controls import exchanged, never_alone, refuse_several_clips, silenced
from nemo_mapo.evaluation.grounding.run import OpenedRun, open_run
from nemo_mapo.files import write_text
from nemo_mapo.rewards.templates import extract_answer
from nemo_mapo.rows import Group, completions_of
from nemo_mapo.training.policies import WarmStarter


def measure_run(
    run_dir: Path, checkpoint: str | None, *, split: str, config: AnalysisConfig, warm_starter: WarmStarter
) -> Path:
    """Write RUN/evidence/<checkpoint>-<split>.json and return its path; arguments and errors as in `analyse_run`."""
    opened = open_run(run_dir, checkpoint, split=split, config=config, warm_starter=warm_starter)
    written = run_dir / "evidence" / f"{opened.checkpoint}-{split}.json"
    return write_text(written, json.dumps(measure(opened, config)))


@torch.no_grad()
def measure(opened: OpenedRun, config: AnalysisConfig) -> dict[str, Any]:
    """Scores of every question by condition, late mass, length, and whether the answer was the usual word.

    Lists are in the order of `ids`. `correct` and `truth` are by condition (full, silence, exchanged, and the
    interventions of `causal`); `truth` is null for a question without comparable completions, `usual` for one whose
    manifest has no usual word.
    """
    subject, found = opened.subject, Found()
    usual_words = usual_by_question(opened)
    subject.policy.eval()
    rows: dict[str, list[Any]] = {"usual": [], "contradicts": [], "tokens": [], "late_mass": []}
    for problems in tqdm(never_alone(opened.batches), desc="evidence", unit="batch", dynamic_ncols=True):
        refuse_several_clips(problems)
        heard = {
            "silence": silenced(problems),
            "exchanged": exchanged(problems, subject.tokenizer, subject.policy.num_audio_tokens, subject.wording),
        }
        own = subject.ask(problems)
        found.ids += [problem.example.id for problem in problems]
        found.chances += [1 / len(problem.example.choices) for problem in problems]
        for name, answers in {"full": own, **{name: subject.ask(changed) for name, changed in heard.items()}}.items():
            found.accuracy[name] += subject.correct(answers)
        add_causal(problems, heard, own, subject, config, found)
        rows["tokens"] += [len(one) for one in completions_of(own)]
        rows["late_mass"] += _late_mass(own, subject, config)
        _add_usual(own, usual_words, subject, rows)
    truth = {name: [None if value != value else value for value in values] for name, values in found.truth.items()}
    return {
        "ids": found.ids,
        "chance": sum(found.chances) / len(found.chances),
        "settings": asdict(config),
        "correct": dict(found.accuracy),
        "truth": truth,
        "without_late_part": found.without_late_part,
        **rows,
    }


def usual_by_question(opened: OpenedRun) -> dict[str, str]:
    """The word that the text suggests, by question, from the field `usual` of Lhotse cuts that have it."""
    paths = [item["cuts_path"] for item in opened.dataset.input_cfg if "cuts_path" in item]
    cuts = [cut for path in paths for cut in load_cuts(path)]
    return {example_id(cut): str(cut.custom["usual"]) for cut in cuts if "usual" in (cut.custom or {})}


def _add_usual(own: Sequence[Group], words: Mapping[str, str], subject: Subject, rows: dict[str, list[Any]]) -> None:
    for group in own:
        usual, (answer,) = words.get(group.example.id), group.completions
        said = extract_answer(answer.text, subject.rewards.template, finished=answer.stopped)
        rows["usual"].append(None if usual is None else float(said == usual))
        rows["contradicts"].append(None if usual is None else group.example.answer != usual)


def _late_mass(own: Sequence[Group], subject: Subject, config: AnalysisConfig) -> list[float | None]:
    """Mean audio mass over the late tokens of each completion; None for one that has none."""
    said = [one.token_ids.tolist() for one in completions_of(own)]
    late_from = parts_of(said, subject.tokenizer, config.late_after).late_from.tolist()
    late = [captured(signals)[first:] for signals, first in zip(subject.signals(own, "max"), late_from, strict=True)]
    return [float(mass.mean()) if len(mass) else None for mass in late]
