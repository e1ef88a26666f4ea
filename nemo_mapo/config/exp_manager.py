"""NeMo's experiment manager: where a run is written, and which loggers it has."""

import netrc
import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import Field

from nemo_mapo.config.base import config_class
from nemo_mapo.config.explain import nearest
from nemo_mapo.config.fields import CountOrZero, Flag, PathText

_WANDB_KEYS: Final = (
    *("name", "project", "entity", "group", "job_type", "tags", "notes", "config", "id", "version", "offline", "mode"),
    *(
        "save_dir",
        "dir",
        "anonymous",
        "log_model",
        "prefix",
        "checkpoint_name",
        "resume",
        "reinit",
        "force",
        "settings",
    ),
    *("save_code", "sync_tensorboard", "config_exclude_keys", "config_include_keys", "allow_val_change", "fork_from"),
    *("resume_from", "monitor_gym"),
)
"""Arguments of Lightning's WandbLogger, and of wandb.init, to which it passes the rest."""
_OFFLINE: Final = ("offline", "disabled", "dryrun")


@config_class
class CheckpointCallbackConfig:
    """The best checkpoints, kept besides the newest, with the keys of Lightning's ModelCheckpoint; `checkpoints/best`
    links to the best of them."""

    monitor: Annotated[str, Field(min_length=1)] | None = None
    """Validation metric; null is val/accuracy, or val/loss if the questions have no choices."""
    mode: Literal["max", "min"] | None = None
    """Which value is best; null is min for a metric that ends in `loss`, otherwise max."""
    save_top_k: CountOrZero = 1
    """How many of the best to keep; 0 keeps only the newest. Ties go to the earlier checkpoint."""

    def score(self, validation: Mapping[str, float]) -> tuple[str, float] | None:
        """The monitored metric and its value, negated if lower is better; None without a validation.

        Raises:
            ValueError: the validation has no such metric.
        """
        if not validation:
            return None
        name = self.monitor or ("val/accuracy" if "val/accuracy" in validation else "val/loss")
        if name not in validation:
            raise ValueError(
                f"exp_manager.checkpoint_callback_params.monitor={name}: validation has no such metric"
                f"{nearest(name, validation)}"
            )
        smallest = (self.mode or ("min" if name.endswith("loss") else "max")) == "min"
        return name, -validation[name] if smallest else validation[name]


@config_class
class ExpManagerConfig:
    """NeMo's experiment manager (the part that a run directory needs)."""

    explicit_log_dir: PathText = "runs/mapo"
    """The run directory. The shipped configs set it to exp_dir/name."""
    exp_dir: PathText | None = None
    """Directory of runs, as in NeMo; `explicit_log_dir` refers to it."""
    name: PathText | None = None
    """Name of the run in `exp_dir`, as in NeMo; `explicit_log_dir` refers to it."""
    resume_if_exists: Flag = False
    """Continue from the newest checkpoint in the run directory."""
    checkpoint_callback_params: CheckpointCallbackConfig = CheckpointCallbackConfig()
    create_tensorboard_logger: Flag = True
    """Write TensorBoard events."""
    create_wandb_logger: Flag = False
    """Log to Weights & Biases."""
    wandb_logger_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of Lightning's WandbLogger; unless given, name is that of the run directory and project nemo-mapo."""

    def __post_init__(self) -> None:
        if not self.explicit_log_dir.strip():
            raise ValueError("explicit_log_dir='' is the working directory: name a directory for the run")
        if self.explicit_log_dir.startswith("None") or "/None" in self.explicit_log_dir:
            raise ValueError(
                f"explicit_log_dir={self.explicit_log_dir}: exp_dir={self.exp_dir} and name={self.name} must be "
                "given together, or explicit_log_dir instead"
            )
        for key in self.wandb_logger_kwargs:
            if key not in _WANDB_KEYS:
                raise ValueError(
                    f"wandb_logger_kwargs has {key!r}, not an argument of WandbLogger{nearest(key, _WANDB_KEYS)}"
                )

    def login_problems(self) -> Iterator[str]:
        """Why Weights & Biases would ask for a login when the run begins."""
        mode = os.environ.get("WANDB_MODE") or self.wandb_logger_kwargs.get("mode")
        if not self.create_wandb_logger or self.wandb_logger_kwargs.get("offline") or mode in _OFFLINE:
            return
        if not os.environ.get("WANDB_API_KEY") and not _in_netrc():
            yield (
                "exp_manager.create_wandb_logger=true: not logged in to Weights & Biases; run `wandb login`, or set "
                "WANDB_API_KEY, or WANDB_MODE=offline"
            )


def _in_netrc() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(str(host)) is not None
    except (OSError, netrc.NetrcParseError):
        return False
