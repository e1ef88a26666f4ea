"""Analyse how a trained model listens: `python examples/analyse.py RUN`; the page goes into RUN/analysis."""

import argparse
from pathlib import Path

from nemo_mapo.console import quiet_upstream, show_own_messages
from nemo_mapo.platform import hide_cuda_devices

hide_cuda_devices()
quiet_upstream()

from pydantic import ValidationError  # noqa: E402

from nemo_mapo.config.analysis import AnalysisConfig  # noqa: E402
from nemo_mapo.embedded.warm_start import start_embedded  # noqa: E402
from nemo_mapo.evaluation.grounding.run import START, analyse_run  # noqa: E402
from nemo_mapo.platform import initialize_parallel, install_cpu_host  # noqa: E402


def main() -> None:
    """Analyse and print where the page is."""
    arguments = _arguments()
    show_own_messages()
    install_cpu_host()
    initialize_parallel()
    settings = {"max_items": arguments.max_items, "ratios": tuple(arguments.ratios), "seed": arguments.seed,
                "samples_per_item": arguments.samples, "collapse_threshold": arguments.collapse,
                "batch_size": arguments.batch_size, "late_after": arguments.late_after}  # fmt: skip
    try:
        config = AnalysisConfig(**settings)
        page = analyse_run(
            arguments.run,
            arguments.checkpoint,
            split=arguments.split,
            config=config,
            warm_starter=start_embedded,
            cuts=arguments.cuts,
        )
    except (ValueError, ValidationError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"page: {page}")


def _arguments() -> argparse.Namespace:
    defaults = AnalysisConfig()
    parser = argparse.ArgumentParser(description=__doc__, epilog="What each metric means: docs/grounding.md")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory of examples/train_mapo.py")
    parser.add_argument("--checkpoint", metavar="NAME", help=f"below RUN/checkpoints, or {START} (default: the newest)")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="(default: %(default)s)")
    parser.add_argument(
        "--cuts", type=Path, metavar="MANIFEST", help="ask the questions of this Lhotse manifest instead"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="questions per batch (default: the split's)")
    parser.add_argument("--max-items", type=int, metavar="N", help="use only N questions, drawn at random with --seed")
    parser.add_argument("--ratios", type=float, nargs="+", default=defaults.ratios, metavar="SHARE",
                        help="shares of a clip to silence (default: %(default)s)")  # fmt: skip
    parser.add_argument("--samples", type=int, default=defaults.samples_per_item, metavar="K",
                        help="completions per question for accuracy by length (default: %(default)s)")  # fmt: skip
    parser.add_argument("--collapse", type=float, default=defaults.collapse_threshold, metavar="SHARE",
                        help="completions above this collapse index have collapsed (default: %(default)s)")  # fmt: skip
    parser.add_argument("--late-after", metavar="TEXT",
                        help="tokens after the first TEXT are late, e.g. '.' (default: the last third)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=defaults.seed, help="(default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
