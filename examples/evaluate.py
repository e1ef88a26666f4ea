"""Evaluate a checkpoint on a benchmark: `python examples/evaluate.py benchmark=mmau [key=value ...]`; see --help."""

from pathlib import Path

from nemo_mapo.config.command_line import read_command_line
from nemo_mapo.config.evaluation import EvaluationConfig
from nemo_mapo.config.start import check_evaluation_start
from nemo_mapo.entry import at_work


def main() -> None:
    """Check the composed config, then evaluate."""
    config = read_command_line(
        Path(__file__).parents[1] / "conf" / "evaluate.yaml", EvaluationConfig, check=check_evaluation_start
    )
    with at_work(gpu=False):
        from nemo_mapo.evaluation.benchmarks.run import checkpoint_engine, evaluate
        from nemo_mapo.platform import initialize_parallel, install_cpu_host

        install_cpu_host()
        initialize_parallel()
        directory = evaluate(config, checkpoint_engine)
    print(f"written: {directory}")


if __name__ == "__main__":
    main()
