"""Import the encoder of a NeMo ASR model (.nemo): writes a config to train an audio LLM with it."""

import argparse
from pathlib import Path

from nemo_mapo.console import quiet_upstream
from nemo_mapo.platform import hide_cuda_devices

hide_cuda_devices()
quiet_upstream()

import yaml  # noqa: E402

from nemo_mapo.models.nemo_encoder import perception_config  # noqa: E402
from nemo_mapo.platform import install_cpu_host  # noqa: E402


def main() -> None:
    """Write OUTPUT/conf/model/perception/imported.yaml, then print the training command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--asr", type=Path, required=True, help=".nemo file of an ASR model")
    parser.add_argument("--output", type=Path, required=True, help="directory in which a folder conf is written")
    arguments = parser.parse_args()
    install_cpu_host()
    target = arguments.output / "conf" / "model" / "perception" / "imported.yaml"
    try:
        if target.exists():
            raise ValueError(f"{target} already exists; remove it or name another directory")
        perception = perception_config(arguments.asr)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    config = {
        "type": "nemo",
        "restore_from_path": str(arguments.asr.absolute()),
        "features": perception.features,
        "module": perception.module,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"# {arguments.asr.name}; made by examples/import_nemo_encoder.py.\n{yaml.safe_dump(config)}")
    conf = arguments.output / "conf"
    print(f"written: {target}")
    print("train with it from the decoder of a checkpoint; model.from_scratch=true in its place starts from noise:")
    print(f"  python examples/train_mapo.py --config-dir {conf} model/perception=imported '~warm_start' \\")
    print("    pretrained_checkpoint.restore_from_path=RUN/checkpoints/step_N")


if __name__ == "__main__":
    main()
