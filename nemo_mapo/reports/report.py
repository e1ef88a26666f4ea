"""`report.html`: one self-contained page on a run, made from the files in its directory."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nemo_mapo.reports.figures import is_recorded, panel_figure, profile_figures, timing_figure
from nemo_mapo.reports.loading import Record, RunFiles, is_supervised, load_run, recorded, section
from nemo_mapo.reports.outcome import Change, Outcome, outcome, question_difference
from nemo_mapo.reports.pages import Block, Card, write_page
from nemo_mapo.reports.panels import SPEED, Section, sections_of
from nemo_mapo.reports.samples import pick_samples, samples_view
from nemo_mapo.reports.summary import duration, number, percent, percent_interval, points
from nemo_mapo.reports.warnings import CHECKED_IN_WORDS, find_warnings
from nemo_mapo.statistics import difference_in_words

REPORT_FILE = "report.html"

DEFAULT_TITLE = "MAPO run"

REFRESH_SECONDS = 60
"""Interval at which the page of an unfinished run reloads itself; it is rewritten at every validation."""


def write_report(run_dir: Path, overlays: Sequence[Path] = ()) -> Path:
    """Write `report.html` into `run_dir` and return its path; the curves of `overlays`, other runs, are drawn over it.

    Charts whose metrics were not recorded are left out and named. The page is self-contained.

    Raises:
        RunFileError: as `load_run`.
    """
    files = load_run(run_dir)
    found = outcome(files)
    runs = {path.name: load_run(path) for path in overlays}
    others = {name: run.metrics for name, run in runs.items()}
    return write_page(
        run_dir / REPORT_FILE,
        "report.html",
        title=str(files.run.get("title") or DEFAULT_TITLE),
        subtitle=_progress(files),
        refresh_seconds=None if files.run.get("finished") else REFRESH_SECONDS,
        commits=recorded([files.run], "commit"),
        commands=recorded([files.run], "command"),
        cards=_cards(found),
        differences=[_difference(files, name, run) for name, run in runs.items()],
        findings=find_warnings(files.metrics, section(files.config, "objective"), chance=found.chance),
        checked=CHECKED_IN_WORDS,
        notes=files.notes,
        sections=[
            *(_block(item, files, others) for item in sections_of(files.config)),
            *([_profiles(files)] if files.profiles or not is_supervised(files.config) else []),
            _timing(files),
        ],
        samples=samples_view(pick_samples(files.rollouts, run_dir), run_dir),
        facts=_facts(files),
        events=[event for event in files.run.get("events") or () if isinstance(event, dict)],
        config_text=files.config_text,
    )


def _difference(files: RunFiles, name: str, other: RunFiles) -> str:
    """A sentence that compares this run's accuracy with another's over the same questions."""
    gap = question_difference(files.test, "correct", other.test, "correct")
    if gap is None:
        return f"Accuracy against {name}: not compared, because the test questions differ."
    words = difference_in_words(100 * gap.low, 100 * gap.high)
    return f"Accuracy minus that of {name}: {points(gap)}, paired over {len(files.test)} test questions: {words}."


def _progress(files: RunFiles) -> str:
    steps = [int(record["step"]) for record in files.metrics]
    facts = [f"{max(steps)} training steps" if steps else "no training step recorded yet"]
    facts += [f"{word} {files.run[word]}" for word in ("started", "finished") if files.run.get(word)]
    if not files.run.get("finished"):
        facts.append("not finished")
    return " · ".join(facts)


def _cards(found: Outcome) -> list[Card]:
    memory = "" if found.peak_rss_gb is None else f"peak memory {found.peak_rss_gb:.1f} GB"
    return [
        _change_card("Accuracy", found.accuracy, percent, _accuracy_hint(found)),
        _change_card("Accuracy with silence", found.accuracy_silent, percent, _silent_hint(found)),
        _change_card("Late audio mass", found.audio_mass_late, _two_digits, "attention to the audio, last third"),
        _change_card("Completion length", found.completion_tokens, number, "tokens"),
        _change_card("Reasoning", found.reasoning_words, number, "words"),
        Card(name="Time", value=duration(found.seconds_total), hint=memory),
    ]


def _accuracy_hint(found: Outcome) -> str:
    counted = "" if found.questions is None else f"{found.questions} "
    facts = [f"{counted}{found.accuracy.source or 'held-out'} questions, chance {percent(found.chance)}"]
    if found.gain is not None:
        facts.insert(0, points(found.gain))
    elif found.accuracy_interval is not None:
        facts.insert(0, percent_interval(found.accuracy_interval))
    return "; ".join(facts)


def _silent_hint(found: Outcome) -> str:
    facts = [percent_interval(found.silent_interval), f"chance {percent(found.chance)}"]
    return "; ".join(fact for fact in facts if fact)


def _two_digits(value: float | None) -> str:
    return number(value, 2)


def _change_card(name: str, change: Change, text: Callable[[float | None], str], hint: str) -> Card:
    if not change.source:
        return Card(name=name, value="not measured", hint=hint)
    if change.start is None or change.end is None:
        return Card(name=name, value=text(change.start if change.end is None else change.end), hint=hint)
    # The unit is shown once, after the second value.
    return Card(name=name, before=text(change.start).removesuffix(" %"), value=text(change.end), hint=hint)


def _block(item: Section, files: RunFiles, others: Mapping[str, Sequence[Record]]) -> Block:
    figures, missing = [], []
    for panel in item.panels:
        figure = panel_figure(panel, files, others)
        if figure is not None:
            figures.append(figure)
        elif not is_recorded(panel, files):
            missing.append(f"{panel.title} ({', '.join(curve.key for curve in panel.curves)})")
    note = f"Not recorded, so not shown: {'; '.join(missing)}." if missing else ""
    return Block(name=item.name, title=item.title, lead=item.lead, figures=figures, note=note)


def _profiles(files: RunFiles) -> Block:
    figures = profile_figures(files)
    return Block(
        name="profiles",
        title="Along the completion",
        lead="Each completion stretched from 0 to 100 %, averaged over held-out questions, before and after training.",
        figures=figures,
        note="" if figures else "No profiles were recorded (profiles.jsonl).",
    )


def _timing(files: RunFiles) -> Block:
    split, speed = timing_figure(files), panel_figure(SPEED, files)
    return Block(
        name="timing",
        title="Time",
        lead="What a training step costs.",
        figures=[figure for figure in (split, speed) if figure is not None],
        note="" if split else "No timings were recorded (timing/…).",
    )


def _facts(files: RunFiles) -> list[str]:
    facts = [f"Part-of-speech tagger: {files.run['pos_tagger']}."] if files.run.get("pos_tagger") else []
    if best := section(files.run, "best_checkpoint"):
        facts.append(f"checkpoints/best is {best.get('name')}, with {best.get('metric')} = {best.get('value')}.")
    return [*facts, f"Made from the files in {files.run_dir.resolve()}."]
