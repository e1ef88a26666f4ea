"""Installation check: `python -m nemo_mapo.doctor` reports what is installed, what is missing and what is wrong.

Nothing heavy is imported: versions come from package metadata.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from nemo_mapo.rollout.trtllm.release import SUPPORTED as TENSORRT_LLM

Verdict = Literal["OK", "missing", "wrong"]
Versions = Mapping[str, str]
"""Installed versions by canonical name."""

DISTRIBUTION = "nemo_mapo"
SETS = tuple(Path(__file__).parents[1] / name for name in ("constraints.txt", "constraints-next.txt"))
"""Sets of versions that were tested together; only a checkout has them, an installed wheel knows only the ranges."""
PYTHON = SpecifierSet(">=3.11,<3.13")
NLTK_PACKAGE = "averaged_perceptron_tagger_eng"
STACK = ("torch", "megatron-core", "nemo-toolkit", "lhotse", "lightning", "transformers", "numpy")
"""Requirements that get a line each; the others are listed only if something is wrong with them."""
WRITABLE = ("runs", ".cache", tempfile.gettempdir())
GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader")
GPU_TIMEOUT_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Component:
    """A dependency without a working package on any index: it comes with NVIDIA's container or is built from source."""

    name: str
    supported: SpecifierSet
    folder: str
    """Subfolder of the real package; projects and stubs of the same name on package indices do not have it."""
    cost: str
    """What is not available without it."""


OPTIONAL = (
    Component(
        name="transformer-engine",
        supported=SpecifierSet(">=2.0"),
        folder="pytorch",
        cost="no model.attention_backend=transformer_engine and no FP8; attention runs on torch's SDPA",
    ),
    Component(
        name="apex",
        supported=SpecifierSet(">=0.1"),
        folder="normalization",
        cost="NeMo's and NeMo-Aligner's own legacy Megatron models cannot be built; nemo-mapo's do not use it",
    ),
    Component(
        name="nemo-aligner",
        supported=SpecifierSet(">=0.7,<0.8"),
        folder="algorithms",
        cost="its trainer contract comes from nemo_mapo.aligner.contract; a NeMo without the nlp collection needs that",
    ),
    Component(
        name="tensorrt-llm",
        supported=TENSORRT_LLM,
        folder="runtime",
        cost="no rollouts by TensorRT-LLM; rollout.backend=megatron or vllm generate without it",
    ),
)
KEPT = ("torch", "transformer-engine", "apex", "tensorrt-llm")
"""The reason to use a container: installing into it must leave these unchanged."""
COMPILED = ("torch", "transformer-engine", "nvidia", "tensorrt", "triton", "flash-attn", "cuda", "numpy")
"""Name prefixes of packages that were built for each other and are pinned together with `KEPT`."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    verdict: Verdict
    subject: str
    detail: str

    def __str__(self) -> str:
        return f"{self.verdict:<8} {self.subject:<22} {self.detail}"


def installed_versions() -> dict[str, str]:
    """Version of every installed distribution."""
    return {canonicalize_name(found.name): found.version for found in importlib.metadata.distributions()}


def requirements() -> dict[str, SpecifierSet]:
    """Supported range of every package that nemo-mapo needs here, from its metadata (pyproject.toml).

    Raises:
        ValueError: nemo-mapo itself is not installed.
    """
    try:
        given = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError("nemo-mapo is not installed; run: pip install --no-deps -e .") from error
    parsed = [Requirement(line) for line in given]
    wanted = [item for item in parsed if item.marker is None or item.marker.evaluate({"extra": ""})]
    return {canonicalize_name(item.name): item.specifier for item in wanted}


def pinned(path: Path) -> dict[str, str]:
    """Versions of the `name==version` lines of a file."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    pairs = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name.strip()): version.strip() for name, version in pairs}


def nearest_set(installed: Versions) -> Path | None:
    """The pinned set that shares the most stack versions with this installation; None without a checkout."""
    there = [path for path in SETS if path.is_file()]
    return max(there, key=lambda path: len(STACK) - len(_unlike(installed, pinned(path))), default=None)


def _unlike(installed: Versions, tested: Versions) -> list[str]:
    return [name for name in STACK if installed.get(name, "").split("+")[0] != tested.get(name)]


def check_set(installed: Versions, path: Path) -> Finding:
    """How the installed stack differs from a pinned set."""
    tested = pinned(path)
    unlike = [f"{name} {tested.get(name)}" for name in _unlike(installed, tested)]
    detail = f"{path.name}, except its {', '.join(unlike)}: this combination is untested" if unlike else path.name
    return Finding(verdict="OK", subject="nearest pinned set", detail=detail)


def supports(supported: SpecifierSet, version: str) -> bool:
    """Whether a version is in the range; release candidates and vendors' builds count as their release."""
    return Version(version).base_version in supported


def check_python(version: str) -> Finding:
    """The interpreter."""
    if version in PYTHON:
        return Finding(verdict="OK", subject="python", detail=version)
    return Finding(verdict="wrong", subject="python", detail=f"{version}: needs {PYTHON}; install such a Python")


def check_packages(
    installed: Versions,
    supported: Mapping[str, SpecifierSet],
    tested: Versions,
    *,
    constraints: str = "constraints.txt",
) -> Iterator[Finding]:
    """A line for each package of the stack and for each other one that is absent or out of range."""
    others = 0
    for name, wanted in supported.items():
        found = installed.get(name)
        fix = f"pip install '{name}{wanted}'" + (f" -c {constraints}" if name in tested else "")
        if found is None:
            yield Finding(verdict="wrong", subject=name, detail=f"not installed: {fix}")
        elif not supports(wanted, found):
            yield Finding(verdict="wrong", subject=name, detail=f"{found}: needs {wanted}: {fix}")
        elif name in STACK:
            also = f"; tested with {tested[name]}" if name in tested else ""
            yield Finding(verdict="OK", subject=name, detail=f"{found} (needs {wanted or 'any'}{also})")
        else:
            others += 1
    yield Finding(verdict="OK", subject="other requirements", detail=f"{others} in range")


def check_optional(component: Component, installed: Versions) -> Finding:
    """A component of `OPTIONAL`, such as Transformer Engine."""
    name, version = component.name, installed.get(component.name)
    if version is None:
        return Finding(verdict="missing", subject=name, detail=component.cost)
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module)
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    if not any(Path(folder, component.folder).is_dir() for folder in folders):
        problem = f"{version}: not NVIDIA's package (no {module}/{component.folder}): pip uninstall {name}"
        return Finding(verdict="wrong", subject=name, detail=problem)
    if not supports(component.supported, version):
        problem = f"{version}: needs {component.supported}; use the container of docs/container.md"
        return Finding(verdict="wrong", subject=name, detail=problem)
    return Finding(verdict="OK", subject=name, detail=f"{version} (needs {component.supported})")


def torch_cuda() -> str | None:
    """CUDA version that the installed torch was built for, read from its source; None for a CPU build or no torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    found = re.search(r"^cuda\b.*?=\s*'([\d.]+)'", Path(spec.origin).with_name("version.py").read_text(), re.MULTILINE)
    return found[1] if found else None


def check_gpu(cuda: str | None) -> Finding:
    """NVIDIA devices that the driver's own tool lists, and whether torch was built for them."""
    cost = "training and generation run on the CPU: the embedded run and the tests"
    if shutil.which(GPU_QUERY[0]) is None:
        return Finding(verdict="missing", subject="gpu", detail=f"no {GPU_QUERY[0]}: {cost}")
    try:
        answer = subprocess.run(GPU_QUERY, capture_output=True, text=True, timeout=GPU_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        problem = f"{GPU_QUERY[0]} did not answer in {GPU_TIMEOUT_SECONDS:g} s; the driver hangs: restart the machine"
        return Finding(verdict="wrong", subject="gpu", detail=problem)
    if answer.returncode != 0:
        said = (answer.stderr or answer.stdout).strip().splitlines()
        problem = f"{GPU_QUERY[0]}: {said[0] if said else 'failed'}; fix the driver, or start the container with GPUs"
        return Finding(verdict="wrong", subject="gpu", detail=problem)
    devices = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    if not devices:
        return Finding(verdict="missing", subject="gpu", detail=f"none visible: {cost}")
    if cuda is None:
        problem = f"{len(devices)} visible, but torch is built for the CPU: install a CUDA build of torch"
        return Finding(verdict="wrong", subject="gpu", detail=problem)
    return Finding(verdict="OK", subject="gpu", detail=f"{len(devices)} x {devices[0]}; torch for CUDA {cuda}")


def nltk_folders() -> list[Path]:
    """Where NLTK looks for its data."""
    given = [folder for folder in os.environ.get("NLTK_DATA", "").split(os.pathsep) if folder]
    home = [os.path.expanduser("~/nltk_data")] if os.path.expanduser("~/") != "~/" else []
    prefix = [f"{sys.prefix}/nltk_data", f"{sys.prefix}/share/nltk_data", f"{sys.prefix}/lib/nltk_data"]
    system = ["/usr/share/nltk_data", "/usr/local/share/nltk_data", "/usr/lib/nltk_data", "/usr/local/lib/nltk_data"]
    return [Path(folder) for folder in (*given, *home, *prefix, *system)]


def check_nltk(folders: Sequence[Path]) -> Finding:
    """Data of the perceptron part-of-speech tagger."""
    for folder in folders:
        tagger = folder / "taggers" / NLTK_PACKAGE
        if tagger.is_dir() or tagger.with_suffix(".zip").is_file():
            return Finding(verdict="OK", subject="nltk data", detail=str(tagger))
    cost = f"the part-of-speech gate uses the tagger without data; get it: python -m nltk.downloader {NLTK_PACKAGE}"
    return Finding(verdict="missing", subject="nltk data", detail=cost)


def check_writable(path: Path) -> Finding:
    """Whether files can be created in a folder, or in its closest existing parent."""
    subject = f"write {path}"
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            free_gb = shutil.disk_usage(existing).free / 1e9
    except OSError as error:
        problem = f"{existing}: {error.strerror}; choose another folder, or fix its permissions"
        return Finding(verdict="wrong", subject=subject, detail=problem)
    return Finding(verdict="OK", subject=subject, detail=f"{free_gb:.0f} GB free")


def check_unchanged(before: Versions, installed: Versions) -> Iterator[Finding]:
    """Whether the container's versions of `KEPT` are still installed."""
    for name in KEPT:
        subject, then, now = f"kept {name}", before.get(name), installed.get(name)
        if then is None:
            problem = "the list has no such package; start from the image of docs/container.md"
            yield Finding(verdict="wrong", subject=subject, detail=problem)
        elif then != now:
            problem = f"{then} before, {now or 'not installed'} now; pin it while you install"
            yield Finding(verdict="wrong", subject=subject, detail=problem)
        else:
            yield Finding(verdict="OK", subject=subject, detail=then)


def pip_files(installed: Versions, supported: Mapping[str, SpecifierSet]) -> tuple[list[str], list[str]]:
    """Requirements to install, and constraints that pin the other requirements and the packages compiled together.

    Pip leaves all other packages alone, unless something it installs needs another version of them.

    Raises:
        ValueError: nemo-mapo does not support the version of a package that must be kept; the message names it.
    """
    to_install = {
        name: wanted
        for name, wanted in supported.items()
        if name not in installed or not supports(wanted, installed[name])
    }
    if blocked := [name for name in KEPT if name in installed and name in to_install]:
        name = blocked[0]
        raise ValueError(f"{name} {installed[name]} is kept, but nemo-mapo needs {to_install[name]}; use another image")
    kept = sorted(
        name
        for name in installed
        if name not in to_install and (name in supported or name in KEPT or name.startswith(COMPILED))
    )
    return [f"{name}{to_install[name]}" for name in sorted(to_install)], [f"{name}=={installed[name]}" for name in kept]


def write_pip_files(folder: Path) -> None:
    """Write requirements.txt and constraints.txt (`pip_files`) for an installation that changes nothing else."""
    to_install, kept = pip_files(installed_versions(), requirements())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in to_install))
    (folder / "constraints.txt").write_text("".join(f"{line}\n" for line in kept))
    print(f"{folder}: {len(to_install)} to install, {len(kept)} kept")


def examine(writable: Sequence[Path], unchanged: Path | None = None) -> Iterator[Finding]:
    """The whole report, line by line."""
    installed = installed_versions()
    yield check_python(".".join(map(str, sys.version_info[:3])))
    if (nearest := nearest_set(installed)) is None:
        yield from check_packages(installed, requirements(), {})
    else:
        yield from check_packages(installed, requirements(), pinned(nearest), constraints=nearest.name)
        yield check_set(installed, nearest)
    yield check_gpu(torch_cuda())
    for component in OPTIONAL:
        yield check_optional(component, installed)
    yield check_nltk(nltk_folders())
    for path in writable:
        yield check_writable(path)
    if unchanged is not None:
        yield from check_unchanged(pinned(unchanged), installed)


def main() -> int:
    """Print the report; 1 if anything is wrong."""
    arguments = _arguments()
    try:
        if arguments.write_pip_files is not None:
            write_pip_files(arguments.write_pip_files)
            return 0
        wrong = 0
        for finding in examine(arguments.writable or [Path(path) for path in WRITABLE], arguments.unchanged):
            print(finding)
            wrong += finding.verdict == "wrong"
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{wrong} wrong" if wrong else "\nNothing is wrong.")
    return min(wrong, 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nemo_mapo.doctor",
        description="Check versions, GPU, optional libraries, data and paths. Each line is OK, missing (with what it "
        "costs) or wrong (with how to fix it). The exit status is 1 if anything is wrong.",
    )
    parser.add_argument(
        "--writable", type=Path, action="append", metavar="DIR", help=f"folder to write to (default {WRITABLE})"
    )
    parser.add_argument(
        "--unchanged",
        type=Path,
        metavar="FILE",
        help=f"also check that {', '.join(KEPT)} still have the versions of FILE (name==version lines)",
    )
    parser.add_argument(
        "--write-pip-files",
        type=Path,
        metavar="DIR",
        help="instead of checking, write requirements.txt (what is missing or out of range here) and constraints.txt "
        "(what must stay as it is)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
