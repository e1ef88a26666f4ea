"""prepare_data.py and inspect_data.py as people run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]

pytestmark = pytest.mark.integration


def python(script, *arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_a_corpus_is_prepared_and_shown(corpus, tmp_path):
    source = corpus("cochlscene")
    done = python("prepare_data.py", "cochlscene", "--input", source.path, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "questions" in done.stdout and "cuts_validation.jsonl.gz" in done.stdout
    shown = python("inspect_data.py", tmp_path / "out", "--output", tmp_path / "page.html", "--samples", 6)
    assert shown.returncode == 0, shown.stderr
    page = (tmp_path / "page.html").read_text()
    assert page.count("<audio controls") == 6 == page.count("data:image/png")
    assert page.count('<li class="right">') == 6


def test_a_mistake_is_one_line_without_a_traceback(tmp_path):
    done = python("prepare_data.py", "avqa", "--input", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: no directory {tmp_path / 'nowhere'}")
