"""Who may import whom, and who may patch what: the contracts of pyproject.toml and a reading of the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nemo_mapo"
PATCHING_ALLOWED = PACKAGE / "platform.py"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Apply the project's import contracts to the package `nemo_mapo` found in `folder`."""
    command = (
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_cache=True))"
    )
    return subprocess.run(
        [sys.executable, "-c", command, str(ROOT / "pyproject.toml")], cwd=folder, capture_output=True, text=True
    )


def copy_of_rooms(folder: Path) -> Path:
    """The package's rooms as empty modules, so that one planted import is the only one."""
    package = folder / "nemo_mapo"
    package.mkdir()
    (package / "__init__.py").touch()
    for room in PACKAGE.iterdir():
        if room.suffix == ".py":
            (package / room.name).touch()
        elif (room / "__init__.py").exists():
            (package / room.name).mkdir()
            (package / room.name / "__init__.py").touch()
    return package


def test_the_package_keeps_its_import_contracts() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_rooms_without_imports_keep_the_contracts(tmp_path: Path) -> None:
    copy_of_rooms(tmp_path)
    result = lint_imports(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("room", "statement"),
    [
        ("types.py", "import nemo_mapo.objective"),
        ("config/__init__.py", "from nemo_mapo import models"),
        ("objective/__init__.py", "import nemo_mapo.attention"),
        ("attention/__init__.py", "import nemo_mapo.models"),
        ("models/__init__.py", "import nemo_mapo.data"),
        ("data/__init__.py", "import nemo_mapo.rollout"),
        ("rollout/__init__.py", "import nemo_mapo.evaluation"),
        ("training/__init__.py", "import nemo_mapo.evaluation"),
        ("data/__init__.py", "import nemo_mapo.embedded"),
        ("training/__init__.py", "import nemo_mapo.embedded"),
        ("evaluation/__init__.py", "import nemo_mapo.embedded"),
        ("reports/__init__.py", "import nemo_mapo.evaluation"),
        ("reports/__init__.py", "import torch"),
        ("objective/__init__.py", "from megatron.core import parallel_state"),
        ("objective/__init__.py", "import logging"),
        ("objective/__init__.py", "def late():\n    from transformers import AutoModel"),
        ("models/__init__.py", "import nemo_mapo.platform"),
        ("new_room.py", "pass"),
    ],
)
def test_an_import_against_the_contracts_is_reported(tmp_path: Path, room: str, statement: str) -> None:
    (copy_of_rooms(tmp_path) / room).write_text(statement + "\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert "BROKEN" in result.stdout


def modules_that_name(*names: str) -> set[str]:
    """Modules of the package that use an attribute or import of one of these names."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            used = [node.attr] if isinstance(node, ast.Attribute) else []
            used += [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            if set(used) & set(names):
                found.add(str(path.relative_to(PACKAGE)))
    return found


def test_what_ranks_tell_each_other_goes_through_one_module() -> None:
    assert modules_that_name("all_gather_object", "broadcast_object_list", "gather_object") == {"ranks.py"}


def test_the_device_of_a_process_is_asked_for_in_one_place() -> None:
    # `data/dataset.py` keeps the random state of the GPU that there is; `platform.py` answers for a CPU host.
    assert modules_that_name("current_device") == {"ranks.py", "data/dataset.py", "platform.py"}


def test_rows_are_padded_at_the_models_door_and_nowhere_else() -> None:
    # Behind the door, layers pad what they compute with; reports pad the sound that they draw.
    padding = modules_that_name("pad_sequence", "pad") - {"reports/data_page.py"}
    assert not {path for path in padding if not path.startswith(("models/", "attention/"))}


def foreign_names(tree: ast.Module) -> set[str]:
    """Names that an import binds to something outside the package."""
    bound = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {
                alias.asname or alias.name.split(".")[0]
                for alias in node.names
                if alias.name.split(".")[0] != "nemo_mapo"
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "nemo_mapo":
            bound |= {alias.asname or alias.name for alias in node.names}
    return bound


def reaches_foreign(node: ast.expr, foreign: set[str]) -> bool:
    """Whether `a`, `a.b.c` or the item `sys.modules[...]` starts at an imported name."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id in foreign


def changed_places(node: ast.AST) -> list[ast.expr]:
    """The attributes and module-table entries that a statement or call writes."""
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    elif isinstance(node, ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"setattr", "delattr"}:
        return [ast.Attribute(value=node.args[0], attr="")]
    else:
        return []
    flat = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
    attributes = [part for part in flat if isinstance(part, ast.Attribute)]
    module_table = [
        part.value for part in flat if isinstance(part, ast.Subscript) and ast.unparse(part.value) == "sys.modules"
    ]
    return attributes + module_table


HOOKS = frozenset({"sys.excepthook"})
"""What Python documents to be set by programs."""


def upstream_patches(source: str) -> list[int]:
    """Lines that write to an attribute of something imported from outside the package."""
    tree = ast.parse(source)
    foreign = foreign_names(tree)
    return sorted(
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt | ast.expr)
        and any(reaches_foreign(place, foreign) for place in changed_places(node) if ast.unparse(place) not in HOOKS)
    )


def test_only_platform_patches_upstream_modules() -> None:
    sources = [path for top in ("nemo_mapo", "examples") for path in (ROOT / top).rglob("*.py")]
    patches = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources
        if path != PATCHING_ALLOWED
        for line in upstream_patches(path.read_text())
    }
    assert not patches, f"only nemo_mapo/platform.py may patch upstream code: {sorted(patches)}"


@pytest.mark.parametrize(
    "patch",
    [
        "import torch\ntorch.cuda.synchronize = print",
        "import torch.cuda as device\ndevice.synchronize, x = print, 1",
        "from megatron.core import parallel_state\nparallel_state.rank = 0",
        "from nemo.core import Module\nModule.forward: object = None",
        "import torch\nsetattr(torch.cuda, 'synchronize', print)",
        "import torch\ndel torch.cuda.synchronize",
        "import sys\nsys.modules['tensorrt_llm'] = object()",
    ],
)
def test_a_patch_of_upstream_code_is_seen(patch: str) -> None:
    assert upstream_patches(patch) == [2]


@pytest.mark.parametrize(
    "harmless",
    [
        "import torch\nx = torch.zeros(1)\nx.grad = None",
        "from nemo_mapo import types\ntypes.x = 1",
        "import os\nos.environ['A'] = 'b'",
        "import sys\nsys.excepthook = print",
        "class A:\n    def f(self):\n        self.x = 1",
    ],
)
def test_ordinary_assignments_are_not_patches(harmless: str) -> None:
    assert upstream_patches(harmless) == []
