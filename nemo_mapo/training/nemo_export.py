"""The encoder of a finished run as files that NeMo loads."""

from dataclasses import replace
from pathlib import Path

from nemo_mapo.data.tokenizer import load_tokenizer
from nemo_mapo.models.nemo_encoder import save_encoder
from nemo_mapo.models.perception import NemoPerception
from nemo_mapo.training.checkpoint import load_part
from nemo_mapo.training.finished_run import find_checkpoint, read_run_config, unsharded
from nemo_mapo.training.policies import build_policy


def export_nemo_encoder(run_dir: Path, checkpoint: str | None, output: Path) -> None:
    """Write the perception module of a checkpoint; see `save_encoder`.

    Args:
        run_dir: of a run with `model.perception.restore_from_path`.
        checkpoint: name below checkpoints/; None is the newest.
        output: folder to write.

    Raises:
        ValueError: no such run or checkpoint, or a run whose encoder is not that of a NeMo ASR model.
    """
    run = read_run_config(run_dir)
    asr = run.model.restored_encoder
    if asr is None:
        raise ValueError(
            f"{run_dir}: model.perception.restore_from_path is not set; only the encoder of a NeMo ASR model can be "
            "exported to one"
        )
    path = find_checkpoint(run_dir, checkpoint)
    policy = build_policy(replace(run, model=unsharded(run.model)), load_tokenizer(run.data.tokenizer))
    load_part(path, policy, "perception")
    assert isinstance(policy.perception, NemoPerception)
    save_encoder(policy.perception, Path(asr), output)
