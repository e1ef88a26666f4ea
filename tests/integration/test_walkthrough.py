"""The commands of docs/walkthrough.md, from questions to the comparison, on a smaller corpus and model."""

import json
import re
import shlex
from pathlib import Path

import pytest

from forked_commands import run
from tests.integration.tiny_run import ROOT, TINY_MODEL

pytestmark = pytest.mark.integration
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMANDS = [
    line for block in BLOCK.findall((ROOT / "docs" / "walkthrough.md").read_text()) for line in block.splitlines()
]
STEPS = 4
SMALLER = {
    "make_synthetic_corpus.py": ["--train", "32", "--validation", "8", "--test", "8"],
    "train_mapo.py": [
        *TINY_MODEL,
        "~warm_start",
        f"trainer.mapo.max_steps={STEPS}",
        "data.phase_steps=[2,2]",
        "trainer.mapo.val_check_interval=2",
        "trainer.mapo.save_interval=2",
    ],
    "evaluate.py": [override for override in TINY_MODEL if override.split(".")[0] in {"model", "rollout"}],
    "analyse.py": ["--samples", "2"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory in which every command of the page has run."""
    place = tmp_path_factory.mktemp("walkthrough")
    for command in COMMANDS:
        _, script, *arguments = shlex.split(command.replace("step_000080", f"step_{STEPS:06d}"))
        smaller = [*arguments, *SMALLER.get(Path(script).name, [])]
        finished = run(Path(script).name, *smaller, cwd=place)
        assert finished.returncode == 0, f"{command}\n{finished.stderr[-3000:]}"
    return place


def test_the_page_works_end_to_end():
    scripts = [Path(shlex.split(command)[1]).name for command in COMMANDS]
    assert list(dict.fromkeys(scripts)) == [
        "make_synthetic_corpus.py",
        "prepare_data.py",
        "inspect_data.py",
        "train_mapo.py",
        "evaluate.py",
        "analyse.py",
        "compare.py",
    ]


def test_both_phases_were_trained(place):
    records = [json.loads(line) for line in (place / "runs/two_phase/metrics.jsonl").read_text().splitlines()]
    assert [record["data/phase"] for record in records[1:]] == [1.0, 1.0, 2.0, 2.0]


def test_the_evaluation_has_every_question_in_its_denominator(place):
    results = json.loads((place / "runs/evaluation/results.json").read_text())
    assert results["overall"]["items"] == 8 and results["overall"]["missing"] == 0


def test_the_analysis_has_every_part_and_a_page(place):
    # The later checkpoint's page has the start beside it.
    for name, charts in (("start", 11), (f"step_{STEPS:06d}", 15)):
        analysis = json.loads((place / f"runs/two_phase/analysis/{name}-test.json").read_text())
        assert analysis["items"] == 8 and analysis["checkpoint"] == name
        assert len(analysis["evidence"]) == 12 and len(analysis["acs"]) == 4
        assert all(len(scores) == 8 for scores in analysis["scores"].values())
        page = (place / f"runs/two_phase/analysis/{name}-test.html").read_text()
        assert "Evidence masking" in page and page.count('<div class="chart"') == charts


def test_the_comparison_names_both(place):
    page = (place / "runs/compare.html").read_text()
    assert "before" in page and "after" in page and page.count('<div class="chart"') == 15
