"""The table of docs/versions.md, from JUnit files."""

from pathlib import Path

from benchmarks.versions import SETS, outcomes, table

REPORT = """<testsuites><testsuite>
<testcase classname="tests.unit.test_one" name="test_passes"/>
<testcase classname="tests.unit.models.test_two" name="test_is_left_out"><skipped message="needs a GPU"/></testcase>
<testcase classname="" name="tests.unit.test_four"><skipped message="collection skipped">\
('/tests/unit/test_four.py', 13, 'Skipped: needs a NeMo up to 2.4')</skipped></testcase>
<testcase classname="tests.{folder}.test_three" name="test_{end}"><{end}/></testcase>
</testsuite></testsuites>"""


def test_the_table_counts_a_test_once_and_says_by_folder_what_passed_and_names_what_failed(tmp_path: Path) -> None:
    (tmp_path / ".venv.xml").write_text(REPORT.format(folder="unit", end="failure"))
    (tmp_path / ".venv-next.xml").write_text(REPORT.format(folder="unit", end="error"))
    (tmp_path / ".venv-next.second.xml").write_text(REPORT.format(folder="integration", end="passed"))
    lines = table(tmp_path)
    assert "| `tests/unit` | 1 passed, 1 failed, 2 skipped | 1 passed, 1 failed, 2 skipped |\n" in lines
    assert "| `tests/integration` | not in the reports | 1 passed |\n" in lines
    assert "- `test_error` of tests.unit.test_three\n" in lines and "- 1 x needs a GPU\n" in lines
    assert all(
        any(line.startswith(f"\nFailed in `{constraints}`") for line in lines) for constraints, _ in SETS.values()
    )
    assert outcomes([]) == "not in the reports"
