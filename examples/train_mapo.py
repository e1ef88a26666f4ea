"""Post-train an audio language model with MAPO: `python examples/train_mapo.py [key=value ...]`; see --help."""

import sys
from pathlib import Path

from nemo_mapo.config.early import wants_gpu
from nemo_mapo.config.load import ConfigError, register_defaults, validate
from nemo_mapo.console import is_first_process, quiet_upstream, show_own_messages
from nemo_mapo.platform import hide_cuda_devices

register_defaults()
if not wants_gpu(sys.argv[1:], config_dir=Path(__file__).parents[1] / "conf", config_name="train_mapo"):
    hide_cuda_devices()
quiet_upstream()

from nemo.core.config import hydra_runner  # noqa: E402
from omegaconf import DictConfig  # noqa: E402


@hydra_runner(config_path="../conf", config_name="train_mapo")
def main(composed: DictConfig) -> None:
    """Check the composed config, then run it."""
    show_own_messages()
    try:
        config = validate(composed)
    except ConfigError as error:
        sys.exit(str(error))
    from nemo_mapo.launch import run
    from nemo_mapo.rewards.judged import RewardsUnavailable
    from nemo_mapo.rollout.protocol import RolloutUnavailable

    quiet_upstream()
    try:
        directory = run(config)
    except (ValueError, RewardsUnavailable, RolloutUnavailable) as error:
        sys.exit(f"error: {error}")
    if is_first_process():
        print(f"report: {directory / 'report.html'}")


if __name__ == "__main__":
    main()
