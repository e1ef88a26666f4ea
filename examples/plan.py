"""Plan the memory of a run: python examples/plan.py [the overrides of train_mapo.py] [plan.KEY=VALUE ...].

Prints the memory that a GPU of every pipeline stage needs, and ends with status 3 if it does not fit. Needs no GPU, and
of the data only the tokenizer (or plan.vocab_size).
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

from nemo_mapo.config.command_line import compose_command_line
from nemo_mapo.config.explain import keys_of
from nemo_mapo.config.load import load
from nemo_mapo.config.plan import PlanConfig
from nemo_mapo.config.run import RunConfig

USER_ERROR, DOES_NOT_FIT = 2, 3
PRIMARY = Path(__file__).parents[1] / "conf" / "train_mapo.yaml"


def main() -> None:
    """Compose and check the config, plan, print."""
    keys = ", ".join(f"plan.{key}" for key in keys_of(PlanConfig))
    try:
        fits = plan(compose_command_line(PRIMARY, description=f"{__doc__}\nKeys of the plan: {keys}"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    sys.exit(0 if fits else DOES_NOT_FIT)


def plan(composed: DictConfig) -> bool:
    """Print the plan; whether it fits."""
    limits = load(composed.pop("plan", None), PlanConfig, under="plan")
    config = load(composed, RunConfig)
    from nemo_mapo.console import quiet_upstream
    from nemo_mapo.platform import hide_cuda_devices, install_cpu_host

    # A plan is computed on the CPU, even if there are GPUs.
    hide_cuda_devices()
    quiet_upstream()
    from nemo_mapo.data.tokenizer import load_tokenizer
    from nemo_mapo.training.plan import as_table, make_plan, too_large

    install_cpu_host()
    vocab_size = limits.vocab_size or config.model.decoder.vocab_size or len(load_tokenizer(config.data.tokenizer))
    planned = make_plan(config, limits, vocab_size=vocab_size)
    print(as_table(planned))
    problem = too_large(planned, limits)
    print(f"does not fit: {problem}" if problem else f"fits a GPU of {limits.gpu_memory_gb:g} GB")
    return problem is None


if __name__ == "__main__":
    main()
