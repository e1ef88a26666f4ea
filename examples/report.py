"""Rewrite a run's report.html and print the run's five-line summary: `python examples/report.py RUN_DIR`."""

import argparse
import time
from pathlib import Path

from nemo_mapo.reports.loading import METRICS_FILE, RUN_FILE, RunFileError
from nemo_mapo.reports.report import REPORT_FILE, write_report
from nemo_mapo.reports.summary import summary_lines

POLL_SECONDS = 2


def main() -> None:
    """Make the report of the run directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="directory that holds metrics.jsonl")
    parser.add_argument("--overlay", nargs="+", type=Path, default=[], metavar="RUN",
                        help="runs whose curves are added to those of run_dir")  # fmt: skip
    parser.add_argument(
        "--watch", action="store_true", help="write the page at every step, until interrupted; wait for the first one"
    )
    arguments = parser.parse_args()
    try:
        if arguments.watch and arguments.run_dir.is_dir():
            _wait_for(arguments.run_dir / METRICS_FILE)
        path = write_report(arguments.run_dir, arguments.overlay)
        lines = summary_lines(arguments.run_dir)
        print("\n".join(lines))
        print(f"report        {path.resolve()}", flush=True)
        if arguments.watch:
            _watch(arguments.run_dir, arguments.overlay)
    except RunFileError as error:
        parser.exit(1, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit()


def _wait_for(file: Path) -> None:
    """Return once the run has recorded something: a warm start may take minutes."""
    if not file.is_file():
        print(f"waiting for {file}", flush=True)
    while not file.is_file():
        time.sleep(POLL_SECONDS)


def _watch(run_dir: Path, overlay: list[Path]) -> None:
    """Rewrite the page whenever the run has recorded something, or has written its own page over it."""
    seen: tuple[list[int], list[int]] | None = None
    while True:
        recorded, page = _times(run_dir, METRICS_FILE, RUN_FILE), _times(run_dir, REPORT_FILE)
        if (recorded, page) != seen:
            write_report(run_dir, overlay)
            seen = recorded, _times(run_dir, REPORT_FILE)
        time.sleep(POLL_SECONDS)


def _times(run_dir: Path, *names: str) -> list[int]:
    """When files were last written, in nanoseconds; those that do not exist are left out."""
    return [path.stat().st_mtime_ns for name in names if (path := run_dir / name).is_file()]


if __name__ == "__main__":
    main()
