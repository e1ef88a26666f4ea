"""Serve rollouts with vLLM: `python examples/serve_vllm.py [key=value ...]`, with the trainer's own overrides.

Writes the files from which vLLM builds the model (not its weights, which the trainer sends) into rollout.vllm.sync_dir,
prints the command and becomes that process. It listens at rollout.vllm.host and .port; docs/rollouts.md.
"""

import os
import shlex
import sys
from pathlib import Path

from nemo_mapo.config.command_line import read_command_line
from nemo_mapo.config.run import RunConfig
from nemo_mapo.entry import at_work


def main() -> None:
    """Check the composed config, then serve."""
    config = read_command_line(Path(__file__).parents[1] / "conf" / "train_mapo.yaml", RunConfig)
    # The server's own process may use GPUs, so none are hidden.
    with at_work(gpu=True):
        from nemo_mapo.rollout.vllm.build import served

        command, environment = served(config)
    print(shlex.join(command), flush=True)
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        sys.exit(
            f"error: rollout.vllm.python={command[0]}: {error.strerror}; `make vllm` builds an environment with vLLM"
        )


if __name__ == "__main__":
    main()
