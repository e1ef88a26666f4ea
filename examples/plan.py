"""Plan the memory of a run: python examples/plan.py [the overrides of train_mapo.py] [plan.KEY=VALUE ...].

Prints what a GPU of every pipeline stage holds, and ends with status 3 where it does not fit. Needs no GPU and no data
but the tokenizer (or plan.vocab_size).
"""

import argparse
import sys
from pathlib import Path

from nemo_mapo.config.load import register_defaults, validate
from nemo_mapo.console import quiet_upstream
from nemo_mapo.platform import hide_cuda_devices

USER_ERROR, DOES_NOT_FIT = 2, 3
CONF = Path(__file__).parents[1] / "conf"


def main() -> None:
    """Compose and check the config, plan, print."""
    arguments = _arguments()
    # A plan is counted on the CPU, also where there are GPUs.
    hide_cuda_devices()
    try:
        searched = (
            [] if arguments.config_dir is None else [f"hydra.searchpath=[file://{arguments.config_dir.absolute()}]"]
        )
        fits = plan([*arguments.overrides, *searched])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    sys.exit(0 if fits else DOES_NOT_FIT)


def plan(overrides: list[str]) -> bool:
    """Print the plan; whether it fits."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    from nemo_mapo.config.plan import load_plan_config

    limits = load_plan_config([override for override in overrides if override.startswith("plan.")])
    register_defaults()
    try:
        with initialize_config_dir(str(CONF), version_base=None):
            composed = compose("train_mapo", [item for item in overrides if not item.startswith("plan.")])
    except HydraException as error:
        raise ValueError(str(error)) from error
    config = validate(composed)
    quiet_upstream()
    from nemo_mapo.data.tokenizer import load_tokenizer
    from nemo_mapo.platform import install_cpu_host
    from nemo_mapo.training.plan import as_table, make_plan, too_large

    install_cpu_host()
    vocab_size = limits.vocab_size or config.model.decoder.vocab_size or len(load_tokenizer(config.data.tokenizer))
    planned = make_plan(config, limits, vocab_size=vocab_size)
    print(as_table(planned))
    problem = too_large(planned, limits)
    print(f"does not fit: {problem}" if problem else f"fits a GPU of {limits.gpu_memory_gb:g} GB")
    return problem is None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="as for train_mapo.py; and plan.gpu_memory_gb, plan.reserved_gb, plan.sequence_tokens, "
        "plan.audio_seconds, plan.vocab_size",
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="further config groups, as for train_mapo.py")
    return parser.parse_args()


if __name__ == "__main__":
    main()
