"""What an entry point has to know of its config before NeMo is imported, which looks for devices at once."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException


def wants_gpu(arguments: Sequence[str], *, config_dir: Path, config_name: str) -> bool:
    """Whether the config that Hydra will compose from the command line says `trainer.accelerator=gpu`.

    False as well where it cannot be composed: Hydra says why when its turn comes.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-path", "-cp", type=Path, default=config_dir)
    parser.add_argument("--config-name", "-cn", default=config_name)
    parser.add_argument("--config-dir", "-cd", type=Path)
    known, rest = parser.parse_known_args(arguments)
    overrides = [argument for argument in rest if not argument.startswith("-")]
    if known.config_dir is not None:
        overrides.append(f"hydra.searchpath=[file://{known.config_dir.absolute()}]")
    try:
        with initialize_config_dir(str(known.config_path.absolute()), version_base=None):
            composed = compose(known.config_name, overrides=overrides)
    except HydraException:
        return False
    return bool(composed.trainer.accelerator == "gpu")
