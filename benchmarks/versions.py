"""Run the tests in each set of versions and write the table of docs/versions.md.

`python benchmarks/versions.py` runs what `make test` runs, in .venv and .venv-next (half an hour each on two cores);
`--reports DIR` runs nothing and takes the JUnit files that are there (`.venv.xml` or several, `.venv.unit.xml`;
`.venv-next.xml`), which may be of a part of the tests.
"""

import argparse
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from nemo_mapo.doctor import STACK, pinned

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
SETS = {".venv": ("constraints.txt", "3.11"), ".venv-next": ("constraints-next.txt", "3.12")}
BEGIN, END = "<!-- table -->\n", "<!-- /table -->\n"


def main() -> None:
    """Run the tests unless there are reports, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reports", type=Path, help="folder of JUnit files")
    parser.add_argument("tests", nargs="*", default=["-m", "not slow"], help="arguments of pytest")
    arguments = parser.parse_args()
    reports = arguments.reports or run(arguments.tests)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "".join(table(reports)) + END + after)


def run(tests: list[str]) -> Path:
    """Run the tests in each environment; returns the folder of their reports."""
    reports = Path(tempfile.mkdtemp())
    for name in SETS:
        command = [str(ROOT / name / "bin" / "python"), "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile"]
        subprocess.run([*command, *tests, f"--junitxml={reports / f'{name}.xml'}"], cwd=ROOT, check=False)
    return reports


def reports_of(name: str, reports: Path) -> list[Path]:
    """The JUnit files of a set."""
    return sorted(reports.glob(f"{name}.xml")) + sorted(reports.glob(f"{name}.*.xml"))


def cases_of(name: str, reports: Path) -> list[ElementTree.Element]:
    """The tests of a set, each once: the newest report has the word."""
    found: dict[tuple[str | None, str | None], ElementTree.Element] = {}
    for path in sorted(reports_of(name, reports), key=lambda path: path.stat().st_mtime):
        found |= {(case.get("classname"), case.get("name")): case for case in ElementTree.parse(path).iter("testcase")}
    return list(found.values())


def table(reports: Path) -> list[str]:
    """Lines of Markdown: a column per set; then what failed, and why tests were left out."""
    sets = {name: pinned(ROOT / constraints) for name, (constraints, _) in SETS.items()}
    cases = {name: cases_of(name, reports) for name in SETS}
    lines = ["| | " + " | ".join(f"`{constraints}`" for constraints, _ in SETS.values()) + " |\n", "|---|---|---|\n"]
    lines.append(row("Python", [python for _, python in SETS.values()]))
    lines += [
        row(name, [versions.get(name, "none") for versions in sets.values()]) for name in (*STACK, "nemo-aligner")
    ]
    for part in sorted({folder(case) for found in cases.values() for case in found}):
        lines.append(
            row(f"`{part}`", [outcomes(case for case in cases[name] if folder(case) == part) for name in SETS])
        )
    for name, found in cases.items():
        failed = [f"- `{case.get('name')}` of {case.get('classname')}\n" for case in found if outcome(case) == "failed"]
        lines += [f"\nFailed in `{SETS[name][0]}`:\n\n", *failed] if failed else []
        reasons = Counter(reason(skip) for case in found for skip in case.iter("skipped"))
        lines += [f"\nLeft out in `{SETS[name][0]}`:\n\n"] if reasons else []
        lines += [f"- {count} x {reason}\n" for reason, count in sorted(reasons.items())]
    return lines


def folder(case: ElementTree.Element) -> str:
    """The folder of tests that a test belongs to, such as tests/unit; a file that is left out has only a name."""
    return "/".join((case.get("classname") or case.get("name", "")).split(".")[:2])


def reason(skip: ElementTree.Element) -> str:
    """Why a test was left out; for a file the text has it, after its line."""
    _, of_a_file, said = (skip.text or "").rstrip("')").partition("Skipped: ")
    return said if of_a_file and skip.get("message") == "collection skipped" else skip.get("message", "")


def outcomes(cases: Iterable[ElementTree.Element]) -> str:
    """How many tests passed, failed and were left out."""
    counted = Counter(map(outcome, cases))
    return (
        ", ".join(f"{counted[kind]:,} {kind}" for kind in ("passed", "failed", "skipped") if counted[kind])
        or "not in the reports"
    )


def row(title: str, cells: list[str]) -> str:
    """A line of the table."""
    return f"| {title} | {' | '.join(cells)} |\n"


def outcome(case: ElementTree.Element) -> str:
    """What became of a test."""
    if case.find("skipped") is not None:
        return "skipped"
    return "passed" if case.find("failure") is None and case.find("error") is None else "failed"


if __name__ == "__main__":
    main()
