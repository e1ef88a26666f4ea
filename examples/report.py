"""Rewrite a run's report.html and print the run's five-line summary: `python examples/report.py RUN_DIR`."""

import argparse
import time
from pathlib import Path

from nemo_mapo.reports.loading import METRICS_FILE, RunFileError
from nemo_mapo.reports.report import write_report
from nemo_mapo.reports.summary import summary_lines

POLL_SECONDS = 5


def main() -> None:
    """Make the report of the run directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="directory that holds metrics.jsonl")
    parser.add_argument("--overlay", nargs="+", type=Path, default=[], metavar="RUN",
                        help="runs whose curves are added to those of run_dir")  # fmt: skip
    parser.add_argument("--watch", action="store_true", help="write the page at every step, until interrupted")
    arguments = parser.parse_args()
    try:
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


def _watch(run_dir: Path, overlay: list[Path]) -> None:
    """Rewrite the page whenever the metrics have grown."""
    seen = 0.0
    while True:
        changed = (run_dir / METRICS_FILE).stat().st_mtime
        if changed != seen:
            write_report(run_dir, overlay)
            seen = changed
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
