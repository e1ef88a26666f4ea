"""Compare grounding analyses on one page: `python examples/compare.py RUN RUN ... --output compare.html`."""

import argparse
from pathlib import Path

from nemo_mapo.reports.analyses import newest_analysis, read_analysis
from nemo_mapo.reports.grounding_page import write_grounding_page


def main() -> None:
    """Write the page and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("analyses", nargs="+", type=Path, metavar="RUN",
                        help="a run directory (its newest analysis is used) or an analysis file")  # fmt: skip
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="names on the page (default: their directories)")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="(default: %(default)s)")
    arguments = parser.parse_args()
    try:
        files = [path if path.suffix == ".json" else newest_analysis(path) for path in arguments.analyses]
        labels = arguments.labels or [path.parent.parent.name for path in files]
        if len(labels) != len(files) or len(set(labels)) < len(labels):
            raise ValueError(f"--labels: give {len(files)} different names, not {labels}")
        analyses = [read_analysis(path, label) for path, label in zip(files, labels, strict=True)]
        print(f"page: {write_grounding_page(analyses, arguments.output, title='Grounding compared')}")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
