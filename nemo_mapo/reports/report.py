"""`report.html`: one self-contained page on a run, made from the files in its directory."""

from collections.abc import Callable
from html import escape
from pathlib import Path

from nemo_mapo.reports.figures import is_recorded, panel_figure, profile_figures, timing_figure
from nemo_mapo.reports.loading import RunFiles, load_run, section
from nemo_mapo.reports.outcome import Change, Outcome, outcome
from nemo_mapo.reports.panels import SECTIONS, SPEED, Section
from nemo_mapo.reports.samples import pick_samples, samples_html, samples_style
from nemo_mapo.reports.summary import duration, number, percent
from nemo_mapo.reports.theme import grid_html, page
from nemo_mapo.reports.warnings import CHECKED_IN_WORDS, find_warnings

REPORT_FILE = "report.html"

DEFAULT_TITLE = "MAPO run"


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into `run_dir` and return its path.

    Charts whose metrics were not recorded are left out and named. The page loads nothing: styles and charts are inline,
    and there is no script.

    Raises:
        RunFileError: as `load_run`.
    """
    files = load_run(run_dir)
    title = str(files.run.get("title") or DEFAULT_TITLE)
    parts = [_head(title, files), _cards(outcome(files)), _warnings(files), _notes(files)]
    parts += [_section(item, files) for item in SECTIONS]
    parts += [_profiles(files), _timing(files), _samples(files), _about(files)]
    path = run_dir / REPORT_FILE
    text = page(title=title, body="\n".join(part for part in parts if part), style=samples_style())
    # Written beside and moved over, so that a reader never sees half a page.
    partial = path.with_suffix(".html.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


def _head(title: str, files: RunFiles) -> str:
    steps = [int(record["step"]) for record in files.metrics]
    facts = [f"{max(steps)} training steps" if steps else "no training step recorded yet"]
    facts += [f"{word} {files.run[word]}" for word in ("started", "finished") if files.run.get(word)]
    if not files.run.get("finished"):
        facts.append("not finished")
    links = [(item.name, item.title) for item in SECTIONS]
    links += [("profiles", "Along the completion"), ("timing", "Time"), ("samples", "Samples"), ("about", "Run")]
    nav = "".join(f'<a href="#{name}">{escape(text)}</a>' for name, text in links)
    return f'<h1>{escape(title)}</h1>\n<p class="sub">{escape(" · ".join(facts))}</p>\n<nav>{nav}</nav>'


def _cards(found: Outcome) -> str:
    accuracy_hint = f"{found.accuracy.source or 'held-out'} questions"
    if found.accuracy_standard_error is not None and found.accuracy.source == "test":
        accuracy_hint += f", standard error {100 * found.accuracy_standard_error:.1f} points"
    memory = "" if found.peak_rss_gb is None else f"peak memory {found.peak_rss_gb:.1f} GB"
    cards = [
        ("Accuracy", _change(found.accuracy, percent), accuracy_hint),
        ("Accuracy with silence", _change(found.accuracy_silent, percent), f"chance {percent(found.chance)}"),
        ("Late audio mass", _change(found.audio_mass_late, _two_digits), "attention on the audio, last third"),
        ("Completion length", _change(found.completion_tokens, number), "tokens"),
        ("Reasoning", _change(found.reasoning_words, number), "words"),
        ("Time", escape(duration(found.seconds_total)), memory),
    ]
    return (
        '<div class="cards">\n'
        + "\n".join(
            f'<div class="card"><div class="name">{escape(name)}</div><div class="value">{value}</div>'
            f'<div class="hint">{escape(hint)}</div></div>'
            for name, value, hint in cards
        )
        + "\n</div>"
    )


def _two_digits(value: float | None) -> str:
    return number(value, 2)


def _change(change: Change, text: Callable[[float | None], str]) -> str:
    if not change.source:
        return '<span class="from">not measured</span>'
    if change.start is None:
        return escape(text(change.end))
    if change.end is None:
        return escape(text(change.start))
    # The unit stands once, behind the second figure.
    start = text(change.start).removesuffix(" %")
    return f'<span class="from">{escape(start)} → </span>{escape(text(change.end))}'


def _warnings(files: RunFiles) -> str:
    findings = find_warnings(files.metrics, section(files.config, "objective"))
    if not findings:
        return (
            '<div class="box fine"><h3>No warnings</h3>'
            f'<p class="note">Checked, as far as recorded: {escape(CHECKED_IN_WORDS)}.</p></div>'
        )
    items = "".join(
        f"<li><b>{escape(item.title)}.</b> {escape(item.detail)} {escape(item.advice)}</li>" for item in findings
    )
    heading = "1 warning" if len(findings) == 1 else f"{len(findings)} warnings"
    return f'<div class="box warn"><h3>{heading}</h3><ul>{items}</ul></div>'


def _notes(files: RunFiles) -> str:
    if not files.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in files.notes)
    return f'<div class="box note"><h3>About the files</h3><ul>{items}</ul></div>'


def _section(item: Section, files: RunFiles) -> str:
    figures, missing = [], []
    for panel in item.panels:
        figure = panel_figure(panel, files)
        if figure is None and not is_recorded(panel, files):
            missing.append(f"{panel.title} ({', '.join(curve.key for curve in panel.curves)})")
        elif figure is not None:
            figures.append(figure)
    left_out = f"Not recorded, so not shown: {'; '.join(missing)}." if missing else ""
    return _block(item.name, item.title, item.lead, grid_html(figures) if figures else "", left_out)


def _profiles(files: RunFiles) -> str:
    figures = profile_figures(files)
    lead = "Each completion stretched from 0 to 100 %, averaged over held-out questions, before and after training."
    left_out = "" if figures else "No profiles were recorded (profiles.jsonl)."
    return _block("profiles", "Along the completion", lead, grid_html(figures) if figures else "", left_out)


def _timing(files: RunFiles) -> str:
    split, speed = timing_figure(files), panel_figure(SPEED, files)
    figures = [figure for figure in (split, speed) if figure is not None]
    left_out = "" if split else "No timings were recorded (timing/…)."
    return _block("timing", "Time", "What a training step costs.", grid_html(figures) if figures else "", left_out)


def _samples(files: RunFiles) -> str:
    samples = pick_samples(files.rollouts)
    lead = (
        "Early and late, right and wrong completions. The underlined choice is the right one. Point at a token for its "
        "figures."
    )
    left_out = "" if samples else "No rollouts were recorded (rollouts.jsonl)."
    return _block("samples", "Samples", lead if samples else "", samples_html(samples) if samples else "", left_out)


def _about(files: RunFiles) -> str:
    facts = [f"Part-of-speech tagger: {files.run['pos_tagger']}."] if files.run.get("pos_tagger") else []
    facts.append(f"Made from the files in {files.run_dir.resolve()}.")
    body = "".join(f"<p>{escape(fact)}</p>" for fact in facts)
    events = [event for event in files.run.get("events") or () if isinstance(event, dict)]
    if events:
        items = "".join(
            f"<li>step {escape(str(event.get('step', '?')))}: {escape(str(event.get('message', '')))}</li>"
            for event in events
        )
        body += f"<details open><summary>Events</summary><ul>{items}</ul></details>"
    if files.config_text:
        body += f"<details><summary>Resolved config</summary><pre>{escape(files.config_text)}</pre></details>"
    return _block("about", "Run", "", body, "")


def _block(name: str, title: str, lead: str, body: str, left_out: str) -> str:
    parts = [f'<section id="{name}">', f"<h2>{escape(title)}</h2>"]
    parts += [f'<p class="lead">{escape(lead)}</p>'] if lead else []
    parts += [body, f'<p class="note">{escape(left_out)}</p>' if left_out else "", "</section>"]
    return "\n".join(part for part in parts if part)
