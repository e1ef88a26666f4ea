"""Print boundaries of duration buckets that fit a split, for data.train_ds.bucket_duration_bins."""

import argparse
from pathlib import Path

from nemo_mapo.console import quiet_upstream

quiet_upstream()

from nemo_mapo.config.data import DatasetConfig  # noqa: E402
from nemo_mapo.data.buckets import estimate_bins  # noqa: E402


def main() -> None:
    """Read durations from the manifests and print the boundaries as an override."""
    arguments = _arguments()
    is_yaml = arguments.input.suffix in (".yaml", ".yml")
    origin = {"input_cfg" if is_yaml else f"{arguments.key}": str(arguments.input)}
    bounds = {"min_duration": arguments.min_duration, "max_duration": arguments.max_duration}
    try:
        found = estimate_bins(DatasetConfig(**origin, **bounds), arguments.buckets)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    for low, high, clips in zip((0.0, *found.bins), (*found.bins, arguments.max_duration), found.clips, strict=True):
        print(f"# {low:8.3f} to {high:8.3f} s: {clips:,} clips")
    print(f"data.train_ds.bucket_duration_bins=[{','.join(f'{border:g}' for border in found.bins)}]")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path, help="a YAML file of input_cfg items, or one manifest")
    parser.add_argument("--key", choices=["cuts_path", "manifest_filepath", "shar_path"], default="cuts_path",
                        help="type of the manifest: Lhotse cuts (default), NeMo, or a Shar directory")  # fmt: skip
    parser.add_argument("--buckets", type=int, default=8, help="number of buckets (default 8)")
    parser.add_argument("--min-duration", type=float, default=0.1, help="shorter clips are left out (default 0.1 s)")
    parser.add_argument("--max-duration", type=float, default=30.0, help="longer clips are left out (default 30 s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
