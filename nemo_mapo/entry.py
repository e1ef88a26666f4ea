"""Set-up of an entry point once its config is checked: devices, messages, and how it reports errors."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_mapo.console import Unavailable, quiet_upstream, show_own_messages

_DEVICES = Path("/dev")


@contextmanager
def at_work(*, gpu: bool) -> Iterator[None]:
    """Set this process up, and exit with a single message if the work fails for a reason that the user can fix.

        config = read_command_line(primary, RunConfig)
        with at_work(gpu=config.trainer.accelerator == "gpu"):
            from nemo_mapo.launch import run  # heavy: only once the config is known to be good
            run(config)

    Args:
        gpu: whether to use the GPUs of this machine; without this, upstream would use them unasked.
    """
    logger = show_own_messages()
    try:
        if not gpu:
            if unused := visible_gpus():
                logger.info(f"{unused} GPU(s) found but not used; trainer.accelerator=gpu uses them")
            from nemo_mapo.platform import hide_cuda_devices

            hide_cuda_devices()
        quiet_upstream()
        yield
    except (ValueError, Unavailable) as error:
        sys.exit(f"error: {error}")


def visible_gpus(devices: Path = _DEVICES) -> int:
    """NVIDIA GPUs that this process could use, without importing torch; 0 if CUDA_VISIBLE_DEVICES hides them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len([path for path in devices.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])
    return present if chosen is None else min(present, len([one for one in chosen.split(",") if one.strip()]))
