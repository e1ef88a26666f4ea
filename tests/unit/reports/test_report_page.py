"""report.html: whole, self-contained, and there for any part of a run."""

import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nemo_mapo.reports.loading import RunFileError
from nemo_mapo.reports.report import write_report

VOID = {"meta", "input", "br"}
ROOT = Path(__file__).parents[3]


class Outline(HTMLParser):
    """Checks nesting and collects ids, references and tags."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.refs, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self._attributes(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._attributes(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def _attributes(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src"):
                self.refs.append(value)
            self.refs += re.findall(r"url\(([^)]*)\)", value or "")


def outline(path):
    found = Outline()
    found.feed(re.sub(r"(<script>).*?(</script>)", r"\1\2", path.read_text(), flags=re.DOTALL))
    assert found.open == []
    return found


@pytest.fixture(scope="module")
def page(make_run, tmp_path_factory):
    """The page of a healthy run; drawing one takes a second or two."""
    return write_report(make_run().write(tmp_path_factory.mktemp("run")))


def run_example(directory):
    command = [sys.executable, "examples/report.py", str(directory)]
    return subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True)


def test_the_page_is_one_well_formed_file_that_refers_to_nothing_else(page):
    assert page.name == "report.html"
    found = outline(page)
    assert len(found.ids) == len(set(found.ids))
    assert found.refs
    assert all(ref.startswith("#") and ref[1:] in found.ids for ref in found.refs)
    assert not {"link", "img", "iframe"} & set(found.tags)
    assert list(page.parent.glob("*.unfinished")) == []


def test_the_page_has_every_chart_with_a_caption_and_words_for_screen_readers(page):
    text = page.read_text()
    for title in (
        "Held-out accuracy",
        "Reward",
        "Parts of the reward",
        "Length of completions",
        "Audio mass in training completions",
        "Policy-gradient and total loss",
        "Attention loss",
        "KL to the reference",
        "Entropy of the policy",
        "Peaks of the masks",
        "Where the time goes",
        "Audio mass along the completion",
        "Differential entropy Δh along the completion",
    ):
        assert f"<figure>\n<h3>{title}</h3>" in text
    assert (
        text.count("<figure>")
        == text.count("</figcaption>")
        == text.count('<div class="chart" role="img" aria-label="')
    )
    assert 'aria-label="with audio from 0.4' in text


def test_the_cards_show_start_and_end(page):
    text = page.read_text()
    assert '<span class="from">43.0 → </span>64.0 %' in text
    assert "chance 25.0 %" in text
    assert "No warnings" in text


def test_the_page_is_small_enough_to_mail(page):
    assert page.stat().st_size < 6_000_000


def test_the_same_files_give_the_same_page(page):
    before = page.read_bytes()
    assert write_report(page.parent).read_bytes() == before


@pytest.mark.parametrize("prefix", ["mapo/", "val/", "timing/"])
def test_charts_without_metrics_are_left_out_and_named(make_run, tmp_path, prefix):
    run = make_run()
    run.drop(prefix)
    path = write_report(run.write(tmp_path))
    outline(path)
    text = path.read_text()
    assert "Not recorded, so not shown" in text or "No timings were recorded" in text


def test_a_run_that_has_only_begun_has_a_page(make_run, tmp_path):
    run = make_run()
    run.metrics, run.profiles, run.rollouts, run.run = run.metrics[:1], [], [], None
    text = write_report(run.write(tmp_path)).read_text()
    assert "not finished" in text
    assert "run.json is missing" in text


def test_the_page_of_an_unfinished_run_reloads_itself(page, make_run, tmp_path):
    run = make_run()
    del run.run["finished"]
    assert '<meta http-equiv="refresh" content="60">' in write_report(run.write(tmp_path)).read_text()
    assert 'http-equiv="refresh"' not in page.read_text()


def test_the_commit_the_command_and_the_config_stand_on_top(make_run, tmp_path):
    run = make_run()
    run.run |= {"commit": "abc123, with changes", "command": "python examples/train_mapo.py 'model.lora={rank: 4}'"}
    text = write_report(run.write(tmp_path)).read_text()
    top = text[: text.index('<section id="learning">')]
    assert (
        "abc123, with changes" in top and "train_mapo.py &#39;model.lora={rank: 4}&#39;" in top and "tau_base:" in top
    )


def test_other_runs_are_laid_over_the_curves(make_run, tmp_path):
    runs = [make_run(seed=seed).write(tmp_path / name) for seed, name in enumerate(("one", "two"))]
    text = write_report(runs[0], runs[1:]).read_text()
    assert "with audio of two from 0.4" in text and '"legendgroup":"two"' in text
    assert (
        "Accuracy minus that of two: +0.0 points [" in text and "paired over 1000 test questions: not settled" in text
    )
    (runs[1] / "test.jsonl").unlink()
    assert "against two: not compared" in write_report(runs[0], runs[1:]).read_text()


def test_an_empty_metrics_file_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    text = write_report(tmp_path).read_text()
    assert "no training step recorded yet" in text
    assert "No rollouts were recorded" in text


def test_a_truncated_line_is_mentioned_on_the_page(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "tra')
    assert "metrics.jsonl line 42 is incomplete" in write_report(run_dir).read_text()


def test_gate_fallbacks_get_a_chart_only_when_there_are_any(page, make_run, tmp_path):
    run = make_run()
    assert "<h3>Gate fallbacks</h3>" not in page.read_text()
    run.metrics[9]["mapo/gate_fallbacks"] = 0.1
    assert "<h3>Gate fallbacks</h3>" in write_report(run.write(tmp_path)).read_text()


def test_warnings_stand_on_the_page(make_run, tmp_path):
    run = make_run()
    run.change("train/kl_loss", lambda progress: 0.6)
    text = write_report(run.write(tmp_path)).read_text()
    assert "1 warning<" in text
    assert "Raise objective.beta" in text


def test_titles_events_and_config_are_escaped(make_run, tmp_path):
    run = make_run()
    run.run["title"] = "<i>run</i>"
    run.run["events"] = [{"step": 1, "message": "<script>"}]
    run.objective["note"] = "</pre><script>"
    text = write_report(run.write(tmp_path)).read_text()
    assert "&lt;/pre&gt;&lt;script&gt;" in text and ": &lt;script&gt;" in text and "<i>run" not in text
    assert "<title>&lt;i&gt;run&lt;/i&gt;</title>" in text


def test_a_reward_that_only_this_run_has_gets_a_chart(make_run, tmp_path):
    run = make_run()
    run.change("rollout/short", lambda progress: progress)
    run.write(tmp_path)
    terms = "{accuracy: {weight: 2}, short: {type: custom, weight: 0.5}, off: {weight: 0}, odd: 3}"
    (tmp_path / "config.yaml").write_text(f"rewards: {{terms: {terms}}}\n")
    text = write_report(tmp_path).read_text()
    assert "Further rewards" in text and "rollout/off" not in text
    (tmp_path / "config.yaml").write_text("rewards: {terms: {accuracy: {weight: 2}}}\n")
    assert "Further rewards" not in write_report(tmp_path).read_text()


def test_the_command_prints_the_summary_and_the_path(run_dir):
    done = subprocess.run(
        [sys.executable, "examples/report.py", str(run_dir)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 6
    assert lines[-1].endswith(str(run_dir / "report.html"))


def test_the_command_says_what_is_wrong_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "examples/report.py", str(tmp_path)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert done.returncode == 1
    assert done.stderr.decode().startswith("error: ")
    with pytest.raises(RunFileError):
        write_report(tmp_path)


def test_a_watched_run_has_its_page_from_its_first_step_on_and_keeps_its_overlays(make_run, tmp_path):
    other, written = make_run(seed=1).write(tmp_path / "other"), make_run().write(tmp_path / "written")
    run = tmp_path / "run"
    run.mkdir()
    page = run / "report.html"
    command = [sys.executable, "examples/report.py", str(run), "--watch", "--overlay", str(other)]
    words = "Accuracy minus that of other"
    with subprocess.Popen(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) as watching:
        try:
            assert watching.stdout.readline() == f"waiting for {run / 'metrics.jsonl'}\n".encode()
            for file in sorted(written.iterdir(), key=lambda file: file.name == "metrics.jsonl"):
                file.rename(run / file.name)
            deadline = time.monotonic() + 300
            for _ in range(2):
                while not (page.is_file() and words in page.read_text()):
                    assert watching.poll() is None and time.monotonic() < deadline
                    time.sleep(0.5)
                    if page.is_file() and time.time() - page.stat().st_mtime > 20:
                        # It fell between the watcher's write and its look at the time of what it wrote.
                        write_report(run)
                # The run writes a page of its own at a validation.
                write_report(run)
        finally:
            watching.kill()


def test_the_page_of_supervised_training_has_its_own_charts_only(make_run, tmp_path):
    run = make_run()
    run.drop("mapo/")
    run.drop("rollout/")
    run.write(tmp_path)
    (tmp_path / "profiles.jsonl").unlink()
    (tmp_path / "config.yaml").write_text("trainer: {sft: {max_steps: 4}}\n")
    text = write_report(tmp_path).read_text()
    assert "Loss on the targets" in text and "Held-out accuracy" in text
    for other in ('href="#masks"', "Along the completion", "Policy-gradient", "profiles.jsonl is missing"):
        assert other not in text
