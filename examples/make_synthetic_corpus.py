"""Synthesise the embedded corpus: clips of sounds with questions, as FLAC files, Lhotse manifests and a tokenizer."""

import argparse
from pathlib import Path

from nemo_mapo.data.splits import SPLITS, manifest_path, tokenizer_path
from nemo_mapo.embedded.prior_shift import PriorShiftConfig, prior_shift_recipe
from nemo_mapo.embedded.synthetic import SyntheticCorpusConfig, recipe, write_recipe
from nemo_mapo.embedded.synthetic_export import export_questions

_EPILOG = """
The result depends only on the arguments: with the same ones a second run does nothing; with others it recreates the
corpus. Train on it with
  python examples/train_mapo.py data.corpus_dir=OUTPUT
The manifests are described in data/lhotse_manifests/README.md.
"""


def _arguments() -> argparse.Namespace:
    defaults = SyntheticCorpusConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write (created if it does not exist)")
    for split in SPLITS:
        size = getattr(defaults, split)
        described = f"{split} clips (default {size})"
        parser.add_argument(f"--{split}", type=int, default=size, metavar="CLIPS", help=described)
    parser.add_argument("--seed", type=int, default=defaults.seed, help=f"seed of every clip (default {defaults.seed})")
    parser.add_argument(
        "--prior-shift",
        action="store_true",
        help="make the corpus whose training text predicts the answer and whose test text does not (docs/evidence.md)",
    )
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="DIR",
        help="also write the corpus as files for prepare_data.py and evaluate.py",
    )
    return parser.parse_args()


def main() -> None:
    """Write the corpus and print the paths of its parts."""
    arguments = _arguments()
    try:
        sizes = {split: getattr(arguments, split) for split in SPLITS}
        if arguments.prior_shift:
            made = write_recipe(prior_shift_recipe(PriorShiftConfig(**sizes, seed=arguments.seed)), arguments.output)
        else:
            made = write_recipe(recipe(SyntheticCorpusConfig(**sizes, seed=arguments.seed)), arguments.output)
        exported = export_questions(arguments.output, arguments.questions) if arguments.questions else []
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print("written:" if made else "already there:")
    for split in SPLITS:
        print(f"  {manifest_path(arguments.output, split)}")
    print(f"  {tokenizer_path(arguments.output)}")
    for path in exported:
        print(f"  {path}")


if __name__ == "__main__":
    main()
