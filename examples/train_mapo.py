"""Post-train an audio language model with MAPO: `python examples/train_mapo.py [key=value ...]`; see --help."""

import sys

from nemo.core.config import hydra_runner
from omegaconf import DictConfig

from nemo_mapo.config.load import ConfigError, register_defaults, validate

register_defaults()


@hydra_runner(config_path="../conf", config_name="train_mapo")
def main(composed: DictConfig) -> None:
    """Check the composed config, then run it."""
    try:
        config = validate(composed)
    except ConfigError as error:
        sys.exit(str(error))
    from nemo_mapo.launch import run

    directory = run(config)
    print(f"report: {directory / 'report.html'}")


if __name__ == "__main__":
    main()
