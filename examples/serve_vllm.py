"""Serve rollouts with vLLM: `python examples/serve_vllm.py [key=value ...]`, with the trainer's own overrides.

Writes what vLLM needs to build the model (not its weights, which the trainer sends) into rollout.vllm.sync_dir, prints
the command and becomes it. rollout.vllm.host and .port say where it listens; docs/rollouts.md.
"""

import os
import shlex
import sys

from nemo_mapo.config.load import ConfigError, register_defaults, validate
from nemo_mapo.console import quiet_upstream, show_own_messages

register_defaults()
quiet_upstream()

from nemo.core.config import hydra_runner  # noqa: E402
from omegaconf import DictConfig  # noqa: E402


@hydra_runner(config_path="../conf", config_name="train_mapo")
def main(composed: DictConfig) -> None:
    """Check the composed config, then serve."""
    show_own_messages()
    try:
        config = validate(composed)
    except ConfigError as error:
        sys.exit(str(error))
    from nemo_mapo.rollout.vllm.build import served

    quiet_upstream()
    try:
        command, environment = served(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(shlex.join(command), flush=True)
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        sys.exit(
            f"error: rollout.vllm.python={command[0]}: {error.strerror}; `make vllm` builds an environment with vLLM"
        )


if __name__ == "__main__":
    main()
