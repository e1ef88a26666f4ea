"""Teach an audio language model targets from your own data: `python examples/sft.py [key=value ...]`; see --help."""

import sys
from pathlib import Path

from nemo_mapo.config.early import wants_gpu
from nemo_mapo.config.load import ConfigError, register_defaults, validate
from nemo_mapo.console import is_first_process, quiet_upstream, show_own_messages
from nemo_mapo.platform import hide_cuda_devices

register_defaults()
if not wants_gpu(sys.argv[1:], config_dir=Path(__file__).parents[1] / "conf", config_name="sft"):
    hide_cuda_devices()
quiet_upstream()

from nemo.core.config import hydra_runner  # noqa: E402
from omegaconf import DictConfig  # noqa: E402


@hydra_runner(config_path="../conf", config_name="sft")
def main(composed: DictConfig) -> None:
    """Check the composed config, then run it."""
    show_own_messages()
    try:
        config = validate(composed)
    except ConfigError as error:
        sys.exit(str(error))
    from nemo_mapo.launch_sft import run_sft

    quiet_upstream()
    try:
        directory = run_sft(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if is_first_process():
        print(f"report: {directory / 'report.html'}")


if __name__ == "__main__":
    main()
