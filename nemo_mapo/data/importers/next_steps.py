"""The next commands for a prepared corpus, ready to paste."""

import shlex
from collections.abc import Collection
from pathlib import Path

from nemo_mapo.data.importers.tokenizer_training import TRAIN
from nemo_mapo.data.splits import SPLITS

_DEFAULT_RATE = 16000
_RESTORE = "pretrained_checkpoint.restore_from_path"
_KEYS = dict(zip(SPLITS, ("train_ds", "validation_ds", "test_ds"), strict=True))


def next_commands(output: Path, splits: Collection[str], *, sample_rate: int, tokenizer: str | None) -> list[str]:
    """Commands to inspect the corpus and to train a policy on it with SFT and MAPO; missing splits are named first.

    `tokenizer` is the requested one: None, `train`, or a directory. In the last case a model made by
    examples/import_hf.py or examples/assemble.py is expected beside it.
    """
    train, validation, test = SPLITS
    lacking = [split for split in (train, validation) if split not in splits]
    if lacking:
        return [
            f"# no question is in {' and '.join(lacking)}, which training needs: give lines a split of their own, "
            "leave out --split, or raise --shares"
        ]
    name = shlex.quote(str(output))
    data = f"data=prepared data.prepared_dir={name}"
    if test not in splits:
        data += " data.test_ds=null"
    if sample_rate != _DEFAULT_RATE:
        data += "".join(f" data.{_KEYS[split]}.sample_rate={sample_rate}" for split in SPLITS if split in splits)
    model, start = "", "model.from_scratch=true"
    if tokenizer != TRAIN:
        place = shlex.quote(_model_beside(tokenizer))
        model, start = f"--config-dir {place}/conf model=imported ", f"{_RESTORE}={place}/checkpoint"
        if tokenizer is None:
            data += f" data.tokenizer={place}/tokenizer"
    return [
        f"python examples/inspect_data.py {name} --output {name}.html",
        f"python examples/sft.py {model}{data} {start} exp_manager.explicit_log_dir=runs/sft",
        f"python examples/train_mapo.py {model}{data} '~warm_start' {_RESTORE}=runs/sft/checkpoints/step_N "
        "exp_manager.explicit_log_dir=runs/mapo",
    ]


def _model_beside(tokenizer: str | None) -> str:
    """The directory of an imported or assembled model, found by its tokenizer; else a name to fill in."""
    beside = None if tokenizer is None else Path(tokenizer).parent
    return str(beside) if beside is not None and (beside / "checkpoint").is_dir() else "MODEL"
