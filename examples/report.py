"""Write a run's report.html again and print the run's five-line summary: `python examples/report.py RUN_DIR`."""

import argparse
from pathlib import Path

from nemo_mapo.reports.loading import RunFileError
from nemo_mapo.reports.report import write_report
from nemo_mapo.reports.summary import summary_lines


def main() -> None:
    """Make the report of the run directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="directory that holds metrics.jsonl")
    arguments = parser.parse_args()
    try:
        path = write_report(arguments.run_dir)
        lines = summary_lines(arguments.run_dir)
    except RunFileError as error:
        parser.exit(1, f"error: {error}\n")
    print("\n".join(lines))
    print(f"report        {path.resolve()}")


if __name__ == "__main__":
    main()
