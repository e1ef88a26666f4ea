"""Commands on the pages: every script, option and config key in them exists."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from nemo_mapo.config.compose import compose

ROOT = Path(__file__).parents[2]
PAGES = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/**/*.md")))
COMMAND = re.compile(
    r"(?:^|[ `])(?:python|torchrun)(?: --nproc-per-node \d+)? ((?:examples|benchmarks)/\w+\.py)([^`]*)"
)
PRIMARY = {
    **dict.fromkeys(("train_mapo", "plan", "serve_vllm"), "train_mapo"),
    **{"sft": "sft", "evaluate": "evaluate"},
}
"""The config that a script composes."""
SHIPPED = {"model/imported.yaml": "model/embedded.yaml", "model/perception/imported.yaml": "model/perception/nemo.yaml"}
"""Options that importers write, and what stands in for them here."""


def commands() -> list[tuple[str, str, str]]:
    """Page, script and arguments of every command; continued lines are joined."""
    return [
        (page.name, script, arguments)
        for page in PAGES
        for line in re.sub(r"\\\n", " ", page.read_text(encoding="utf-8")).splitlines()
        for script, arguments in COMMAND.findall(line)
    ]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config directory such as importers write."""
    folder = tmp_path_factory.mktemp("conf")
    for option, stand_in in SHIPPED.items():
        (folder / option).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "conf" / stand_in, folder / option)
    return folder


def test_the_pages_have_commands() -> None:
    assert len(commands()) > 60


@pytest.mark.parametrize(("page", "script", "arguments"), commands())
def test_a_command_of_a_page_names_what_exists(page: str, script: str, arguments: str, imported: Path) -> None:
    given = shlex.split(arguments, comments=True)
    source = (ROOT / script).read_text(encoding="utf-8")
    if (primary := PRIMARY.get(Path(script).stem)) is None:
        options = {word for word in given if word.startswith("--")} - {"--help"}
        unknown = [word for word in options if not {f'"{word}"', f'"{word[2:]}"'} & set(re.findall(r'"[^"]*"', source))]
        assert unknown == []
        return
    overrides = [word for word in given if "=" in word or word.startswith("~")]
    # "key=value" and the planner's own section.
    overrides = [word for word in overrides if not word.startswith(("[", "key=", "plan."))]
    compose(ROOT / "conf" / f"{primary}.yaml", overrides, search_path=[imported])
