"""Export the trained encoder of a run: an ASR model and a perception module that NeMo loads."""

import argparse
from pathlib import Path

from nemo_mapo.console import quiet_upstream
from nemo_mapo.platform import hide_cuda_devices

hide_cuda_devices()
quiet_upstream()

from nemo_mapo.platform import initialize_parallel, install_cpu_host  # noqa: E402
from nemo_mapo.training.nemo_export import export_nemo_encoder  # noqa: E402


def main() -> None:
    """Read the run's config and checkpoint, write asr.nemo, perception.yaml and perception.pt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory of examples/train_mapo.py")
    parser.add_argument("--checkpoint", metavar="NAME", help="below RUN/checkpoints (default: the newest)")
    parser.add_argument("--output", type=Path, required=True, help="directory to write; must not exist yet")
    arguments = parser.parse_args()
    install_cpu_host()
    initialize_parallel()
    try:
        export_nemo_encoder(arguments.run, arguments.checkpoint, arguments.output)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
