"""Evaluate a checkpoint on a benchmark: `python examples/evaluate.py benchmark=mmau [key=value ...]`; see --help."""

import sys

from nemo_mapo.console import quiet_upstream, show_own_messages
from nemo_mapo.platform import hide_cuda_devices

hide_cuda_devices()
quiet_upstream()

from nemo.core.config import hydra_runner  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from nemo_mapo.config.evaluation import register_evaluation_defaults, validate_evaluation  # noqa: E402
from nemo_mapo.config.load import ConfigError  # noqa: E402

register_evaluation_defaults()


@hydra_runner(config_path="../conf", config_name="evaluate")
def main(composed: DictConfig) -> None:
    """Check the composed config, then evaluate."""
    show_own_messages()
    try:
        config = validate_evaluation(composed)
    except ConfigError as error:
        sys.exit(str(error))
    from nemo_mapo.evaluation.benchmarks.run import checkpoint_engine, evaluate
    from nemo_mapo.platform import initialize_parallel, install_cpu_host
    from nemo_mapo.rewards.judge import JudgeError
    from nemo_mapo.rollout.protocol import RolloutUnavailable

    quiet_upstream()
    install_cpu_host()
    initialize_parallel()
    try:
        directory = evaluate(config, checkpoint_engine)
    except (ValueError, JudgeError, RolloutUnavailable) as error:
        sys.exit(f"error: {error}")
    print(f"written: {directory}")


if __name__ == "__main__":
    main()
