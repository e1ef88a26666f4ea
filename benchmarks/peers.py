"""Seconds and memory of a GRPO step here and in TRL: `make peers`, or `python benchmarks/peers.py`.

Both sides run in processes of their own and take steps in turn: TRL's GRPOTrainer in .venv-peers, ours here, with the
same decoder, prompts, sampling, rows per pass, threads and lengths (all completions are forced to T tokens), a
reference model, and one optimiser step per batch. TRL has no audio, so the race is over text prompts; our GRPO and MAPO
steps on prompts of the same length that are mostly audio stand beside it. A ratio is the median over rounds.
"""

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Tokens of a prompt and of each completion, completions per prompt, prompts in the batch, and rows per pass."""

    prompt_tokens: int
    completion_tokens: int
    group: int
    prompts: int
    rows: int
    wanted: float
    """How many times TRL's speed `--check` asks for."""


SHAPES = (
    Shape(prompt_tokens=30, completion_tokens=62, group=8, prompts=8, rows=16, wanted=1.5),
    Shape(prompt_tokens=400, completion_tokens=200, group=8, prompts=2, rows=8, wanted=2.0),
    Shape(prompt_tokens=775, completion_tokens=480, group=4, prompts=2, rows=4, wanted=2.0),
)
SIDES = ("TRL", "ours", "ours, audio", "ours, audio, MAPO")


class Side:
    """A process that takes a step when told to."""

    def __init__(self, command: list[str | Path], log: Path) -> None:
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.log = log
        self.resting_mib = self._answer()["resting_mib"]

    def step(self, clock: str) -> dict[str, float]:
        """Take one; its seconds, its peak memory, and how far that is above what libraries and model take."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        taken = self._answer()
        return taken | {"seconds": taken[clock], "rise_mib": taken["peak_mib"] - self.resting_mib}

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("peer "):
                answer: dict[str, Any] = json.loads(line.removeprefix("peer "))
                return answer
        sys.exit(f"{self.process.args} ended:\n{self.log.read_text()[-2000:]}")

    def close(self) -> None:
        """No further step."""
        self.process.kill()
        self.process.wait()


def main() -> None:
    """Race at each shape and print one table."""
    arguments = parse_arguments()
    columns = f"{'s/step':>8}{'tokens/s':>10}{'peak MiB':>10}{'of step':>9}{'TRL / it':>10}"
    print(f"{'(P, T, G)':<16}{'side':<20}{columns}  range")
    slow = []
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            rounds = race(shape, arguments, Path(folder))
        ratio, memory = report(shape, rounds)
        slow += [shape] if ratio < shape.wanted or memory > 1 else []
    if arguments.check and slow:
        sys.exit(f"slower than asked for, or with more memory than TRL: {slow}")


def race(shape: Shape, arguments: argparse.Namespace, folder: Path) -> list[dict[str, dict[str, float]]]:
    """Rounds in which every side takes one step; the first, a warm-up, left out."""
    base = asdict(shape) | {
        "model": str(folder / "decoder"),
        "layers": arguments.layers,
        "width": arguments.width,
        "positions": 2048,
        "threads": arguments.threads,
        "prompts": prompts_of(shape),
        "temperature": 1.2,
        "top_k": 50,
        "top_p": 0.99,
        "beta": 0.01,
        "learning_rate": 1e-6,
    }
    ours: list[str | Path] = [sys.executable, HERE / "peers_ours.py"]
    written = write_settings(folder / "export.json", base)
    subprocess.run([*ours, written, "--export"], check=True, stdout=subprocess.DEVNULL)
    commands = {
        "TRL": [arguments.python, HERE / "peers_trl.py", written],
        "ours": [*ours, write_settings(folder / "text.json", base | {"method": "grpo", "audio": False})],
        "ours, audio": [*ours, write_settings(folder / "audio.json", base | {"method": "grpo", "audio": True})],
        "ours, audio, MAPO": [*ours, write_settings(folder / "mapo.json", base | {"method": "mapo", "audio": True})],
    }
    with contextlib.ExitStack() as stack:
        sides = {
            name: stack.enter_context(contextlib.closing(Side(command, folder / f"{number}.log")))
            for number, (name, command) in enumerate(commands.items())
        }
        rounds = [
            {name: side.step(arguments.clock) for name, side in sides.items()} for _ in range(arguments.rounds + 1)
        ]
    return rounds[1:]


def prompts_of(shape: Shape) -> list[str]:
    """Random digits, which are a token each."""
    chosen = random.Random(0)
    return ["".join(chosen.choices("0123456789", k=shape.prompt_tokens)) for _ in range(shape.prompts)]


def write_settings(path: Path, settings: dict[str, Any]) -> Path:
    """What a side reads."""
    path.write_text(json.dumps(settings))
    return path


def report(shape: Shape, rounds: list[dict[str, dict[str, float]]]) -> tuple[float, float]:
    """Print the rows of a shape; TRL's seconds over ours, and our peak memory over TRL's."""
    tokens = shape.prompts * shape.group * shape.completion_tokens
    for name, seconds, ratios in rows_of(rounds):
        peak, rise = (max(one[name][kind] for one in rounds) for kind in ("peak_mib", "rise_mib"))
        print(
            f"({shape.prompt_tokens}, {shape.completion_tokens}, {shape.group})".ljust(16)
            + f"{name:<20}{seconds:>8.2f}{tokens / seconds:>10.0f}{peak:>10.0f}{rise:>9.0f}"
            + f"{statistics.median(ratios):>10.2f}  {min(ratios):.2f} to {max(ratios):.2f}",
            flush=True,
        )
    ratio = statistics.median(one["TRL"]["seconds"] / one["ours"]["seconds"] for one in rounds)
    peaks = {name: max(one[name]["peak_mib"] for one in rounds) for name in ("TRL", "ours")}
    return ratio, peaks["ours"] / peaks["TRL"]


def rows_of(rounds: list[dict[str, dict[str, float]]]) -> Iterator[tuple[str, float, list[float]]]:
    """Name of a side, its median seconds, and TRL's seconds over its own in each round."""
    for name in SIDES:
        ratios = [one["TRL"]["seconds"] / one[name]["seconds"] for one in rounds]
        yield name, statistics.median(one[name]["seconds"] for one in rounds), ratios


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, meaning in (
        ("layers", 4, "decoder layers"),
        ("width", 192, "hidden size"),
        ("rounds", 5, "rounds of steps, after one to warm up"),
        ("threads", 1, "torch threads of each side"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument(
        "--python", default=".venv-peers/bin/python", help="interpreter that has TRL (default: %(default)s)"
    )
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu beside other work (default: %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="fail if the goals are missed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
