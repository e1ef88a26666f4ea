"""Rewrite a run's report.html and print the run's five-line summary: `python examples/report.py RUN_DIR`."""

import argparse
import time
from pathlib import Path

from nemo_mapo.reports.loading import METRICS_FILE, RUN_FILE, RunFileError
from nemo_mapo.reports.report import REPORT_FILE, write_report
from nemo_mapo.reports.summary import summary_lines

POLL_SECONDS = 2

_Seen = tuple[list[int], list[int]]


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
        seen = _write(arguments.run_dir, arguments.overlay)
        print("\n".join(summary_lines(arguments.run_dir)))
        print(f"report        {(arguments.run_dir / REPORT_FILE).resolve()}", flush=True)
        if arguments.watch:
            _watch(arguments.run_dir, arguments.overlay, seen)
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


def _watch(run_dir: Path, overlay: list[Path], seen: _Seen) -> None:
    """Rewrite the page whenever the run has recorded something, or has written its own page over it."""
    while True:
        time.sleep(POLL_SECONDS)
        if seen != (_times(run_dir, METRICS_FILE, RUN_FILE), _times(run_dir, REPORT_FILE)):
            seen = _write(run_dir, overlay)


def _write(run_dir: Path, overlay: list[Path]) -> _Seen:
    """Write the page; returns when what it shows, and when itself, was written."""
    recorded = _times(run_dir, METRICS_FILE, RUN_FILE)
    write_report(run_dir, overlay)
    return recorded, _times(run_dir, REPORT_FILE)


def _times(run_dir: Path, *names: str) -> list[int]:
    """When files were last written, in nanoseconds; those that do not exist are left out."""
    return [path.stat().st_mtime_ns for name in names if (path := run_dir / name).is_file()]


if __name__ == "__main__":
    main()
