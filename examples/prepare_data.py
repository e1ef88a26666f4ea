"""Make Lhotse manifests of multiple-choice questions from a corpus on this machine; nothing is downloaded."""

import argparse
from pathlib import Path

from nemo_mapo.console import quiet_upstream

quiet_upstream()

from nemo_mapo.data.importers.base import Source  # noqa: E402
from nemo_mapo.data.importers.next_steps import next_commands  # noqa: E402
from nemo_mapo.data.importers.prepare import PrepareOptions, prepare  # noqa: E402
from nemo_mapo.data.importers.registry import IMPORTERS  # noqa: E402
from nemo_mapo.data.splits import SPLITS, manifest_path  # noqa: E402

_EPILOG = """
Expected files in INPUT:
{layouts}

OUTPUT gets cuts_<split>.jsonl.gz, prepare_report.json, a tokenizer with --tokenizer, and copies of audio if --resample
requires them. docs/data.md describes how corpora become questions. At the end the next commands are printed.
"""


def main() -> None:
    """Prepare the corpus and print what it holds and what was left out."""
    arguments = _arguments()
    source = Source(
        path=arguments.input, audio_dir=arguments.audio_dir, seed=arguments.seed, group_by=arguments.group_by
    )
    try:
        options = PrepareOptions(
            sample_rate=arguments.resample or arguments.sample_rate,
            resample=arguments.resample is not None,
            skip_invalid=arguments.skip_invalid,
            shares=tuple(arguments.shares),
            split=arguments.split,
            tokenizer=arguments.tokenizer,
            vocabulary=arguments.vocabulary,
        )
        report = prepare(IMPORTERS[arguments.name], source, arguments.output, options)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(report.table())
    print("written:")
    for split in report.splits:
        print(f"  {manifest_path(arguments.output, split)}")
    print("next:")
    commands = next_commands(
        arguments.output,
        report.splits,
        sample_rate=options.sample_rate,
        tokenizer=options.tokenizer,
    )
    for command in commands:
        print(f"  {command}")


def _arguments() -> argparse.Namespace:
    layouts = "\n".join(f"  {name}: {importer.layout}" for name, importer in IMPORTERS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=_EPILOG.format(layouts=layouts),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=IMPORTERS, metavar="NAME", help=f"one of {', '.join(IMPORTERS)}")
    parser.add_argument("--input", type=Path, required=True, help="the corpus's directory (or one file of it)")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--audio-dir", type=Path, help="where the audio is, if not where the corpus has it")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument(
        "--sample-rate", type=int, default=16000, metavar="HZ", help="sample rate of the audio (default 16000)"
    )
    rate.add_argument("--resample", type=int, metavar="HZ", help="write mono FLAC copies at this rate where needed")
    parser.add_argument(
        "--skip-invalid", action="store_true", help="count invalid lines as dropped instead of stopping"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of drawn choices and of the split (default 0)")
    parser.add_argument(
        "--shares",
        type=float,
        nargs=3,
        default=PrepareOptions.shares,
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="shares of the questions of a corpus without splits (default 0.9 0.05 0.05)",
    )
    parser.add_argument(
        "--group-by",
        metavar="FIELD",
        help="keep questions with the same value of this field (speaker) in one split; default: about the same file",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="train|DIR",
        help="train a tokenizer on the text of the training split, or copy your model's tokenizer (its tokenizer/)",
    )
    parser.add_argument(
        "--vocabulary",
        type=int,
        default=PrepareOptions.vocabulary,
        metavar="N",
        help=f"maximum number of entries of a trained tokenizer (default {PrepareOptions.vocabulary})",
    )
    parser.add_argument("--split", choices=SPLITS, help="put everything into this split")
    return parser.parse_args()


if __name__ == "__main__":
    main()
