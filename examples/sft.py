"""Fine-tune an audio language model on your own data (SFT): `python examples/sft.py [key=value ...]`; see --help."""

from pathlib import Path

from nemo_mapo.config.command_line import read_command_line
from nemo_mapo.config.run import RunConfig
from nemo_mapo.config.start import check_start
from nemo_mapo.entry import at_work
from nemo_mapo.processes import is_main_rank


def main() -> None:
    """Check the composed config, then run it."""
    config = read_command_line(Path(__file__).parents[1] / "conf" / "sft.yaml", RunConfig, check=check_start)
    with at_work(gpu=config.trainer.accelerator == "gpu"):
        from nemo_mapo.launch_sft import run_sft

        directory = run_sft(config)
    if is_main_rank():
        print(f"report: {directory / 'report.html'}")


if __name__ == "__main__":
    main()
