"""The commands of docs/own_data.md, in their order: from recordings and a table to a model that transformers loads.

Recordings are tones with the names of spoken digits; SPOKEN_DIGITS=DIR takes real ones (two of each digit and speaker).
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from transformers import AutoModelForCausalLM

from tests.integration.parts_tiny import save_chat_model, save_whisper
from tests.integration.tiny_run import ROOT, environment, metrics

pytestmark = pytest.mark.integration
PAGE = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE) for line in block.splitlines()
]
SFT_STEPS, MAPO_STEPS = 12, 2
SHORT = ["data.prompt.instruction=null", "rollout.sampling.max_new_tokens=96"]
ADDED = {
    "evaluate.py": SHORT,
    "analyse.py": ["--samples", "2", "--ratios", "0.5"],
}
"""To the commands that the page's rehearsal says nothing about."""
REAL_NUMBERS = ("0", "1")


def rehearsal() -> dict[str, list[str]]:
    """What the page appends to the lines of sft.py and train_mapo.py."""
    lines = re.findall(r"^    (trainer\.num_threads=1 .*)$", PAGE, re.MULTILINE)
    (sft,), (mapo,) = ([line for line in lines if name in line] for name in ("trainer.sft", "trainer.mapo"))
    return {"sft.py": shlex.split(sft), "train_mapo.py": shlex.split(mapo)}


def write_recordings(directory: Path) -> None:
    """Six speakers say ten digits: as tones, or as they did where SPOKEN_DIGITS says."""
    directory.mkdir()
    if (real := os.environ.get("SPOKEN_DIGITS")) is not None:
        for path in Path(real).glob("*.wav"):
            if path.stem.split("_")[2] in REAL_NUMBERS:
                shutil.copy(path, directory)
        return
    seconds = np.arange(2400) / 8000
    for number, speaker in enumerate(("ann", "bob", "cat", "dan", "eve", "fay")):
        for digit in range(10):
            pitch, formant = 200 + 90 * digit + 7 * number, 900 + 200 * (digit % 3)
            tone = 0.3 * np.sin(2 * np.pi * pitch * seconds) + 0.1 * np.sin(2 * np.pi * formant * seconds)
            soundfile.write(directory / f"{digit}_{speaker}_0.wav", tone, 8000)


def as_rehearsed(command: str) -> list[str]:
    """A line of the page as a script with arguments, with its rehearsal's steps."""
    _, script, *arguments = shlex.split(
        command.replace("step_000300", f"step_{SFT_STEPS:06d}").replace("step_000080", f"step_{MAPO_STEPS:06d}")
    )
    name = Path(script).name
    return [str(ROOT / script), *arguments, *rehearsal().get(name, []), *ADDED.get(name, [])]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which every command of the page has run."""
    place = tmp_path_factory.mktemp("own")
    save_whisper(place / "models" / "whisper-tiny-en")
    save_chat_model(place / "models" / "smollm2")
    write_recordings(place / "recordings")
    (place / "commands.json").write_text(json.dumps([as_rehearsed(command) for command in COMMANDS]))
    finished = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "integration" / "run_commands.py"), "commands.json"],
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    (place / "output.txt").write_text(finished.stdout)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return place


def test_the_page_walks_the_whole_road():
    scripts = [Path(shlex.split(command)[1]).name for command in COMMANDS]
    assert scripts == [
        *("spoken_digits.py", "assemble.py", "prepare_data.py", "inspect_data.py", "sft.py", "train_mapo.py"),
        *("evaluate.py", "analyse.py", "export_hf.py"),
    ]


def test_prepare_data_prints_the_commands_of_the_page(place):
    printed = [line.strip() for line in (place / "output.txt").read_text().splitlines() if "data/mine" in line]
    for script in ("inspect_data.py", "sft.py", "train_mapo.py"):
        (line,) = (line for line in printed if line.startswith(f"python examples/{script}"))
        (ours,) = (command for command in COMMANDS if script in command)
        assert set(shlex.split(line.replace("step_N", "step_000300"))) <= set(shlex.split(ours))


def test_speakers_are_kept_apart(place):
    report = json.loads((place / "data/mine/prepare_report.json").read_text())
    assert report["labels_in_several_splits"] == [] and list(report["splits"]) == ["train", "validation", "test"]
    assert all(len(split["answers"]) == 10 for split in report["splits"].values())


def test_sft_takes_the_steps_of_its_own_section_and_learns(place):
    records = metrics(place / "runs/sft")
    assert records[-1]["step"] == SFT_STEPS
    assert records[-1]["val/loss"] < records[0]["val/loss"]


def test_mapo_starts_from_the_taught_policy(place):
    records = metrics(place / "runs/mapo")
    assert [record["step"] for record in records] == list(range(MAPO_STEPS + 1))
    assert {"accuracy", "accuracy_silent", "format"} <= json.loads((place / "runs/mapo/run.json").read_text())[
        "test"
    ].keys()


def test_the_evaluation_has_chance_intervals_and_every_question(place):
    results = json.loads((place / "runs/evaluation/results.json").read_text())
    questions = json.loads((place / "data/mine/prepare_report.json").read_text())["splits"]["test"]["questions"]
    assert results["overall"]["items"] == questions and results["overall"]["missing"] == 0
    assert results["chance"] == pytest.approx(0.1)
    assert [table["fields"] for table in results["tables"]] == [["task"], ["speaker"]]
    assert 0 <= results["overall"]["low"] <= results["overall"]["score"] <= results["overall"]["high"] <= 1


def test_the_analysis_has_a_page(place):
    (page,) = (place / "runs/mapo/analysis").glob("*.html")
    assert "Evidence masking" in page.read_text()


def test_the_exported_decoder_is_one_that_transformers_loads(place):
    model = AutoModelForCausalLM.from_pretrained(place / "models/trained")
    assert model.config.model_type == "llama"
    assert (place / "models/trained/perception/model.safetensors").is_file()
