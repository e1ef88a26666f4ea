"""Run the tests in each set of versions and write the table of docs/versions.md.

`python benchmarks/versions.py` runs what `make test` runs, in .venv and .venv-next (half an hour each on two cores);
`--reports DIR` takes the JUnit files that are there (`.venv.xml`, `.venv-next.xml`, also of a part of the tests).
"""

import argparse
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from nemo_mapo.doctor import STACK, pinned

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
SETS = {".venv": ("constraints.txt", "3.11"), ".venv-next": ("constraints-next.txt", "3.12")}
BEGIN, END = "<!-- table -->\n", "<!-- /table -->\n"


def main() -> None:
    """Run what has no report yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reports", type=Path, default=Path(tempfile.mkdtemp()), help="folder of JUnit files")
    parser.add_argument("tests", nargs="*", default=["-m", "not slow"], help="arguments of pytest")
    arguments = parser.parse_args()
    for name in SETS:
        report = arguments.reports / f"{name}.xml"
        if not report.is_file():
            command = [str(ROOT / name / "bin" / "python"), "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile"]
            subprocess.run([*command, *arguments.tests, f"--junitxml={report}"], cwd=ROOT, check=False)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "".join(table(arguments.reports)) + END + after)


def table(reports: Path) -> list[str]:
    """Lines of Markdown: a column per set; then why tests were left out."""
    sets = {name: pinned(ROOT / constraints) for name, (constraints, _) in SETS.items()}
    cases = {name: list(ElementTree.parse(reports / f"{name}.xml").iter("testcase")) for name in SETS}
    lines = ["| | " + " | ".join(f"`{constraints}`" for constraints, _ in SETS.values()) + " |\n", "|---|---|---|\n"]
    lines.append(row("Python", [python for _, python in SETS.values()]))
    lines += [
        row(name, [versions.get(name, "none") for versions in sets.values()]) for name in (*STACK, "nemo-aligner")
    ]
    outcomes = {name: Counter(map(outcome, found)) for name, found in cases.items()}
    lines += [row(kind, [str(outcomes[name][kind]) for name in SETS]) for kind in ("passed", "failed", "skipped")]
    for name, found in cases.items():
        reasons = Counter(skip.get("message", "") for case in found for skip in case.iter("skipped"))
        lines += [f"\nLeft out in `{SETS[name][0]}`:\n\n"] if reasons else []
        lines += [f"- {count} x {reason}\n" for reason, count in sorted(reasons.items())]
    return lines


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
