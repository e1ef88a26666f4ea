"""The start-up check: what it calls missing and what wrong, how it mends, and what an installation may change."""

import os
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import nltk.data
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from nemo_mapo import doctor
from nemo_mapo.attention.te_support import MINIMUM_TE
from nemo_mapo.doctor import Finding
from nemo_mapo.pos_gate.tagger import PERCEPTRON_PACKAGE

ROOT = Path(__file__).parents[2]
MAX_SECONDS = 5.0
RANGES = {"torch": SpecifierSet(">=2.6"), "nltk": SpecifierSet(">=3.9")}
APEX = next(component for component in doctor.OPTIONAL if component.name == "apex")


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nemo_mapo.doctor", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def project_ranges() -> dict[str, SpecifierSet]:
    """What pyproject.toml says, which an environment knows as soon as it is installed again."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return {canonicalize_name(parsed.name): parsed.specifier for parsed in map(Requirement, lines)}


def by_subject(findings) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def program(folder: Path, name: str, *lines: str) -> str:
    """A PATH where the program of this name is a shell script of these lines."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_healthy_installation_has_no_findings_and_is_checked_quickly(tmp_path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # A PATH without the driver's tool: a GPU here would not match every torch that runs the tests.
    report = run_doctor("--writable", str(tmp_path), PATH=str(tmp_path))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor: a busy machine makes nothing here slow.
    assert used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime < MAX_SECONDS
    assert report.returncode == 0, report.stdout + report.stderr
    lines = report.stdout.splitlines()
    assert lines[-1] == "Nothing is wrong."
    for subject in (*doctor.STACK, "gpu", "transformer-engine", "apex", "tensorrt-llm", "nltk data", "write"):
        assert [line for line in lines if line[9:].startswith(subject)], subject


def test_it_imports_nothing_heavy() -> None:
    code = "import sys; from nemo_mapo.doctor import examine; list(examine([])); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert not {"torch", "nemo", "megatron", "nltk", "transformers", "numpy"} & set(loaded.split())


def test_a_package_of_the_stack_in_range_shows_its_version_range_and_what_was_tested() -> None:
    found = by_subject(doctor.check_packages({"torch": "2.7.0", "nltk": "3.9"}, RANGES, {"torch": "2.13.0"}))
    assert str(found["torch"]) == "OK       torch                  2.7.0 (needs >=2.6; tested with 2.13.0)"
    assert found["other requirements"].detail == "1 in range"


def test_a_package_out_of_range_or_absent_is_wrong_with_the_command_that_fixes_it() -> None:
    found = by_subject(doctor.check_packages({"torch": "2.5.1"}, RANGES, {"torch": "2.13.0"}))
    assert (found["torch"].verdict, found["nltk"].verdict) == ("wrong", "wrong")
    assert found["torch"].detail == "2.5.1: needs >=2.6: pip install 'torch>=2.6' -c constraints.txt"
    assert found["nltk"].detail == "not installed: pip install 'nltk>=3.9'"


def test_both_measured_sets_are_known_and_in_range() -> None:
    ranges = project_ranges()
    assert list(ranges["megatron-core"].filter(["0.12.3", "0.16.1", "0.19.2", "0.20.0"])) == ["0.12.3", "0.19.2"]
    for path in doctor.SETS:
        versions = doctor.pinned(path)
        assert doctor.nearest_set(versions) == path
        assert str(doctor.check_set(versions, path)).endswith(path.name)
        found = doctor.check_packages(versions, ranges, versions, constraints=path.name)
        assert [str(finding) for finding in found if finding.verdict != "OK"] == []


@pytest.mark.parametrize(("path", "extras"), zip(doctor.SETS, (("dev", "aligner"), ("dev", "nemo3")), strict=True))
def test_a_set_can_be_installed_with_its_extras(path: Path, extras: tuple[str, ...]) -> None:
    """Of a pin outside the range of an extra pip says only that it found no way, after minutes."""
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    versions = doctor.pinned(path)
    for wanted in (Requirement(line) for extra in extras for line in offered[extra]):
        pin = versions[canonicalize_name(wanted.name)]
        assert pin in wanted.specifier, f"{path.name}: {wanted.name}=={pin} is not {wanted.specifier}"


def test_what_differs_from_the_nearest_measured_set_is_said() -> None:
    newer = doctor.SETS[1]
    versions = doctor.pinned(newer) | {"transformers": "5.1"}
    assert doctor.nearest_set(versions) == newer
    said = doctor.check_set(versions, newer).detail
    assert "transformers" in said and "this combination is untested" in said


@pytest.mark.parametrize(
    ("version", "inside"),
    [("2.6.0", True), ("2.7.0a0+7c8ec84dab.nv25.3", True), ("2.6.0rc1", True), ("2.5.1+cu124", False)],
)
def test_a_vendors_build_or_candidate_counts_as_its_release(version: str, inside: bool) -> None:
    assert doctor.supports(SpecifierSet(">=2.6"), version) == inside


@pytest.mark.parametrize(("version", "verdict"), [("3.10.14", "wrong"), ("3.11.7", "OK"), ("3.13.0", "wrong")])
def test_python_outside_the_range_is_wrong(version: str, verdict: str) -> None:
    assert doctor.check_python(version).verdict == verdict


def test_the_ranges_are_those_of_the_project_without_its_extras() -> None:
    ranges = doctor.requirements()
    assert set(doctor.STACK) <= set(ranges)
    assert ranges == project_ranges(), "pyproject.toml is newer than what is installed: make env"
    assert "pytest" not in ranges


def test_what_no_index_has_is_missing_with_its_cost() -> None:
    finding = doctor.check_optional(APEX, {})
    assert (finding.verdict, finding.detail) == ("missing", APEX.cost)


def distribution(folder: Path, name: str, version: str, part: str) -> None:
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / name / part).mkdir(parents=True)
    (folder / name / "__init__.py").touch()


@pytest.mark.parametrize(
    ("version", "part", "said"),
    [
        ("0.1", "normalization", "OK       apex                   0.1 (needs >=0.1)"),
        ("0.9.10.dev0", "interfaces", "wrong    apex                   0.9.10.dev0: not NVIDIA's package"),
        ("0.0.1", "normalization", "wrong    apex                   0.0.1: needs >=0.1"),
    ],
)
def test_another_project_called_apex_is_distinguished_from_nvidias(
    tmp_path, version: str, part: str, said: str
) -> None:
    distribution(tmp_path, "apex", version, part)
    report = run_doctor("--writable", str(tmp_path), PYTHONPATH=str(tmp_path), PATH=str(tmp_path))
    assert said in report.stdout
    assert report.returncode == (1 if said.startswith("wrong") else 0)


def test_transformer_engines_least_version_is_that_of_the_table_of_kernels() -> None:
    engine = next(component for component in doctor.OPTIONAL if component.name == "transformer-engine")
    assert engine.supported == SpecifierSet(f">={'.'.join(map(str, MINIMUM_TE))}")


def test_gpus_are_counted_and_a_torch_for_the_cpu_beside_them_is_wrong(tmp_path, monkeypatch) -> None:
    card = "NVIDIA H100 80GB HBM3, 81559 MiB, 550.54.15, 9.0"
    monkeypatch.setenv("PATH", program(tmp_path, "nvidia-smi", f"echo '{card}'", f"echo '{card}'"))
    assert str(doctor.check_gpu("12.8")).split(maxsplit=2)[2] == f"2 x {card}; torch for CUDA 12.8"
    assert doctor.check_gpu(None).verdict == "wrong"


@pytest.mark.parametrize(
    ("lines", "verdict", "said"),
    [
        (["exit 0"], "missing", "none visible"),
        (["echo 'Driver/library version mismatch'", "exit 18"], "wrong", "Driver/library version mismatch"),
    ],
)
def test_no_device_is_missing_and_a_broken_driver_is_wrong(tmp_path, monkeypatch, lines, verdict, said) -> None:
    monkeypatch.setenv("PATH", program(tmp_path, "nvidia-smi", *lines))
    finding = doctor.check_gpu("12.8")
    assert (finding.verdict, said in finding.detail) == (verdict, True)


def test_a_driver_that_hangs_is_wrong(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", program(tmp_path, "nvidia-smi", "exec sleep 10"))
    monkeypatch.setattr(doctor, "GPU_TIMEOUT_SECONDS", 0.2)
    assert doctor.check_gpu("12.8").verdict == "wrong"


def test_the_cuda_version_of_torch_is_read_without_importing_it() -> None:
    import torch

    assert doctor.torch_cuda() == torch.version.cuda


def test_nltk_data_are_looked_for_where_nltk_looks() -> None:
    assert doctor.NLTK_PACKAGE == PERCEPTRON_PACKAGE
    assert [str(folder) for folder in doctor.nltk_folders()] == nltk.data.path


def test_nltk_data_are_found_unpacked_or_zipped(tmp_path) -> None:
    assert doctor.check_nltk([tmp_path]).verdict == "missing"
    (tmp_path / "taggers").mkdir()
    (tmp_path / "taggers" / f"{PERCEPTRON_PACKAGE}.zip").touch()
    assert doctor.check_nltk([tmp_path / "nowhere", tmp_path]).verdict == "OK"


def test_a_folder_that_is_to_be_made_is_writable_where_its_parent_is(tmp_path) -> None:
    assert doctor.check_writable(tmp_path / "runs" / "mine").verdict == "OK"
    assert list(tmp_path.iterdir()) == []


def test_a_path_through_a_file_is_not_writable(tmp_path) -> None:
    (tmp_path / "file").touch()
    finding = doctor.check_writable(tmp_path / "file" / "runs")
    assert finding.verdict == "wrong"
    assert "choose another folder" in finding.detail


def test_pip_is_to_install_only_what_is_absent_or_out_of_range_and_to_keep_what_is_needed_or_compiled() -> None:
    installed = {"torch": "2.7.0a0+nv25.2", "nltk": "3.8", "lhotse": "1.30", "torchvision": "0.2", "apex": "0.1"}
    wanted = RANGES | {"jaxtyping": SpecifierSet(">=0.2.36"), "lhotse": SpecifierSet(">=1.26")}
    to_install, kept = doctor.pip_files(installed | {"nemo-mapo": "0.1.0", "wheel": "0.45"}, wanted)
    assert to_install == ["jaxtyping>=0.2.36", "nltk>=3.9"]
    assert kept == ["apex==0.1", "lhotse==1.30", "torch==2.7.0a0+nv25.2", "torchvision==0.2"]


def test_a_kept_package_that_is_not_supported_stops_the_installation() -> None:
    with pytest.raises(ValueError, match=r"torch 2\.5\.1 is kept, but nemo-mapo needs >=2\.6; use another image"):
        doctor.pip_files({"torch": "2.5.1"}, RANGES)


def test_what_a_container_brought_must_be_there_unchanged() -> None:
    before = {"torch": "2.7.0a0", "transformer-engine": "2.0", "apex": "0.1"}
    now = {"torch": "2.7.0a0", "transformer-engine": "2.1", "tensorrt-llm": "0.16"}
    found = by_subject(doctor.check_unchanged(before, now))
    assert {subject.removeprefix("kept "): finding.verdict for subject, finding in found.items()} == {
        "torch": "OK",
        "transformer-engine": "wrong",
        "apex": "wrong",
        "tensorrt-llm": "wrong",
    }
    assert "2.0 before, 2.1 now" in found["kept transformer-engine"].detail
    assert "0.1 before, not installed now" in found["kept apex"].detail


def test_the_files_for_pip_agree_with_what_is_installed_and_serve_as_the_list_of_what_to_keep(tmp_path) -> None:
    written = run_doctor("--write-pip-files", str(tmp_path))
    assert written.returncode == 0, written.stderr
    assert (tmp_path / "requirements.txt").read_text() == ""
    assert doctor.pinned(tmp_path / "constraints.txt")["torch"] == doctor.installed_versions()["torch"]
    report = run_doctor("--writable", str(tmp_path), "--unchanged", str(tmp_path / "constraints.txt"))
    assert report.returncode == 1, "this is no container: it has no apex"
    assert "OK       kept torch" in report.stdout


def test_a_list_that_is_not_there_is_an_error_on_one_line(tmp_path) -> None:
    report = run_doctor("--unchanged", str(tmp_path / "nothing.txt"))
    assert report.returncode == 2
    assert report.stderr.startswith("error: ")
    assert len(report.stderr.splitlines()) == 1
