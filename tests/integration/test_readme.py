"""The README's Python example, run as it is printed but for its overrides."""

import re
import subprocess
import sys

import pytest

from forked_commands import environment
from tests.integration.tiny_run import ROOT, command, write_tiny_corpus

pytestmark = pytest.mark.integration
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def test_the_python_example_trains_and_sums_up(tmp_path):
    (example,) = EXAMPLE.findall((ROOT / "README.md").read_text())
    assert len(example.splitlines()) <= 11
    corpus = write_tiny_corpus(tmp_path / "synthetic")
    overrides = command(corpus, tmp_path / "run", "trainer.mapo.max_steps=2")[2:]
    smaller, count = re.subn(r"^overrides = .*$", lambda _: f"overrides = {overrides!r}", example, flags=re.MULTILINE)
    assert count == 1
    finished = subprocess.run(
        [sys.executable, "-c", smaller], cwd=ROOT, capture_output=True, text=True, check=False, env=environment()
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.splitlines()[-5].startswith("accuracy") and (tmp_path / "run" / "report.html").is_file()
