"""prepare_data.py and inspect_data.py as people run them."""

import pytest

from forked_commands import run

pytestmark = pytest.mark.integration


def test_a_corpus_is_prepared_and_shown(corpus, tmp_path):
    source = corpus("cochlscene")
    done = run("prepare_data.py", "cochlscene", "--input", source.path, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "questions" in done.stdout and "cuts_validation.jsonl.gz" in done.stdout
    shown = run("inspect_data.py", tmp_path / "out", "--output", tmp_path / "page.html", "--samples", 6)
    assert shown.returncode == 0, shown.stderr
    page = (tmp_path / "page.html").read_text()
    assert page.count("<audio controls") == 6 == page.count("data:image/png")
    assert page.count('<li class="right">') == 6


def test_a_mistake_is_one_line_without_a_traceback(tmp_path):
    done = run("prepare_data.py", "avqa", "--input", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: no directory {tmp_path / 'nowhere'}")
