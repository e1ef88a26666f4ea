"""A manifest of many cuts: seconds to the first batch (start-up checks included), and memory that they take.

All cuts refer to a few clips: the manifest is large, the disk stays small.
"""

import argparse
import gzip
import resource
import sys
import tempfile
import time
from pathlib import Path

from nemo_mapo.console import quiet_upstream

quiet_upstream()

from nemo_mapo.config.data import DatasetConfig  # noqa: E402
from nemo_mapo.data.dataset import PromptDataset, build_dataloader, longest_prompt, skip_batches  # noqa: E402
from nemo_mapo.data.manifests import validate_manifest  # noqa: E402
from nemo_mapo.data.splits import manifest_path, tokenizer_path  # noqa: E402
from nemo_mapo.data.tokenizer import load_tokenizer  # noqa: E402
from nemo_mapo.embedded.synthetic import SyntheticCorpusConfig, write_corpus  # noqa: E402
from nemo_mapo.types import Wording  # noqa: E402

MOST_SECONDS, MOST_GIB = 10.0, 1.0
CLIPS = 64
RESUME_AT = 1000


def main() -> None:
    """Write the manifest, then measure; with --check fail where it takes too long or too much."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuts", type=int, default=1_000_000, help="cuts in the manifest (default: %(default)s)")
    parser.add_argument(
        "--check-cuts", type=int, default=1000, help="cuts that start-up looks at (default: %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help=f"fail above {MOST_SECONDS:g} s or {MOST_GIB:g} GiB")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        write_corpus(SyntheticCorpusConfig(train=CLIPS, validation=1, test=1), corpus, progress=False)
        manifest = write_manifest(corpus, arguments.cuts)
        megabytes = manifest.stat().st_size / 2**20
        split = DatasetConfig(
            input_cfg=({"type": "lhotse", "cuts_path": str(manifest)},),
            shuffle=True,
            infinite=True,
            check_cuts=arguments.check_cuts,
        )
        seconds, gibibytes, resumed = measure(split, corpus)
    print(f"{arguments.cuts} cuts in {megabytes:.0f} MiB, shuffled, infinite, the first {arguments.check_cuts} checked")
    print(f"first batch after {seconds:.1f} s; {gibibytes:.2f} GiB more than before")
    print(f"batch {RESUME_AT} of a resumed run after {resumed:.1f} s")
    if arguments.check and (seconds > MOST_SECONDS or gibibytes > MOST_GIB):
        sys.exit(f"asked for are {MOST_SECONDS:g} s and {MOST_GIB:g} GiB")


def write_manifest(corpus: Path, count: int) -> Path:
    """Repeat the corpus's cuts under ids of their own."""

    with gzip.open(manifest_path(corpus, "train"), "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    path = corpus / "many.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            line = lines[number % len(lines)]
            file.write(line.replace('{"id": "', f'{{"id": "{number}-', 1) + "\n")
    return path


def measure(split: DatasetConfig, corpus: Path) -> tuple[float, float, float]:
    """Seconds to the first batch, GiB that the process grew by meanwhile, seconds to a batch far into the run."""
    dataset = PromptDataset(load_tokenizer(tokenizer_path(corpus)), lambda samples: samples // 1280, Wording())
    before, started = peak_gib(), time.perf_counter()
    validate_manifest(split)
    loader = build_dataloader(split, prompt_dataset=dataset, drop_last=True)
    longest_prompt(loader, limit=split.check_cuts)
    next(iter(loader))
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    skip_batches(loader, 0, RESUME_AT)
    next(iter(loader))
    resumed = time.perf_counter() - started
    return seconds, peak_gib() - before, resumed


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
