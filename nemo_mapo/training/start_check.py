"""Whether a run has a start, and one that was taught what the run trains on; checked before anything is built."""

from pathlib import Path

from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.config.run import RunConfig
from nemo_mapo.data.manifests import cut_ids

_WAYS_OUT = (
    "teach the policy first (python examples/sft.py data=..., then pretrained_checkpoint.restore_from_path="
    "RUN/checkpoints/step_N), or give another checkpoint there"
)


def check_start_given(config: RunConfig) -> None:
    """ValueError for a run that would silently begin with random weights."""
    given = config.warm_start is not None or config.pretrained_checkpoint.restore_from_path is not None
    if given or config.model.from_scratch:
        return
    if config.supervised:
        raise ValueError(
            "this run would start from random weights: set pretrained_checkpoint.restore_from_path (made by "
            "examples/import_hf.py or examples/assemble.py from public models), or model.from_scratch=true"
        )
    raise ValueError(
        "this run has neither a warm start nor pretrained_checkpoint.restore_from_path, and random weights earn no "
        f"reward to learn from: {_WAYS_OUT}; model.from_scratch=true starts from random weights all the same"
    )


def check_start_fits(config: RunConfig) -> None:
    """ValueError if training cuts are none of those that the warm start was taught on, with their number."""
    if config.warm_start is None or config.pretrained_checkpoint.restore_from_path is not None:
        return
    if not Path(config.warm_start.cuts_path).is_file():
        raise ValueError(
            f"warm_start.cuts_path={config.warm_start.cuts_path}: no such manifest. Drop it with ~warm_start, and "
            f"{_WAYS_OUT}"
        )
    taught = cut_ids(DatasetConfig(input_cfg=({"type": "lhotse", "cuts_path": config.warm_start.cuts_path},)))
    trained = {name for phase in config.data.train_ds.in_phases() for name in cut_ids(phase.split)}
    if foreign := sorted(trained - taught):
        raise ValueError(
            f"{len(foreign)} of {len(trained)} cuts of data.train_ds ({foreign[0]}, ...) are not in "
            f"warm_start.cuts_path={config.warm_start.cuts_path}: the start would describe other sounds than these. "
            f"Drop it with ~warm_start, and {_WAYS_OUT}"
        )
