"""The package as a whole: quick to import, versioned, in files of a readable size, described as it is."""

import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from packaging.version import Version

import nemo_mapo
from nemo_mapo.types import AudioBatch

ROOT = Path(__file__).parents[2]
MAX_IMPORT_SECONDS = 1.0
MAX_FILE_LINES = 400
HEAVY = ("torch", "nemo", "megatron", "lhotse", "transformers", "nltk", "matplotlib", "hydra", "pydantic")

EQUATION_FUNCTIONS = re.findall(r"`(nemo_mapo\.[\w.]+)`", (ROOT / "docs" / "equations.md").read_text())
PAGES = sorted(page.relative_to(ROOT) for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_importing_the_package_is_quick() -> None:
    code = "import time; start = time.process_time(); import nemo_mapo; print(time.process_time() - start)"
    # The best of three: a busy machine may delay one start, a heavy import delays all.
    assert min(float(run_python(code)) for _ in range(3)) <= MAX_IMPORT_SECONDS


def test_importing_the_package_loads_no_heavy_stack() -> None:
    loaded = run_python("import sys, nemo_mapo; print(*sys.modules)").split()
    assert not set(HEAVY) & set(loaded)


def test_the_version_is_valid_and_has_a_changelog_entry() -> None:
    assert str(Version(nemo_mapo.__version__)) == nemo_mapo.__version__
    assert f"## {nemo_mapo.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_what_lies_in_no_python_package_is_installed_as_data() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["nemo_mapo"]
    data = {path for pattern in patterns for path in (ROOT / "nemo_mapo").glob(pattern)}
    tracked = subprocess.run(["git", "ls-files", "nemo_mapo"], cwd=ROOT, check=True, capture_output=True, text=True)
    for path in map(ROOT.joinpath, tracked.stdout.split()):
        assert path in data or (path.suffix == ".py" and (path.parent / "__init__.py").exists()), path


def test_no_source_file_is_longer_than_the_limit() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "nemo_mapo").rglob("*.py")}
    assert not {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MAX_FILE_LINES}


def test_interpreter_lines_of_the_pages_work_as_printed_in_the_environment() -> None:
    """`python examples/...`, with the environment active as README and index say; every script is there."""
    assert "source .venv/bin/activate" in (ROOT / "README.md").read_text()
    assert "source .venv/bin/activate" in (ROOT / "docs" / "index.md").read_text()
    wrong = []
    for page in PAGES:
        for line in (ROOT / page).read_text().splitlines():
            for interpreter, script in re.findall(r"(\S*python\S*) ((?:examples|benchmarks|tests)/\S+\.py)", line):
                if interpreter.lstrip("`") != "python" or not (ROOT / script).is_file():
                    wrong.append(f"{page}: {line.strip()}")
    assert not wrong


def test_a_wrong_shape_is_refused_while_testing() -> None:
    with pytest.raises(TypeCheckError, match="lengths"):
        AudioBatch(waveforms=torch.zeros(2, 16000), lengths=torch.tensor([16000]))


@pytest.mark.parametrize("name", EQUATION_FUNCTIONS)
def test_every_function_of_the_equation_table_exists(name: str) -> None:
    assert callable(pkgutil.resolve_name(name))


def test_the_equation_table_covers_the_numbered_equations() -> None:
    table = (ROOT / "docs" / "equations.md").read_text()
    assert [number for number in range(1, 6) if f"Eq. {number} |" not in table] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!\w+://)([^)#]+)", (ROOT / page).read_text())
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()] == []
