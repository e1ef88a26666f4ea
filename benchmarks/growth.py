"""How a step's time and memory grow with completion, prompt, group and audio: `python benchmarks/growth.py`.

One value changes at a time, the others stay at the base. A step is generation, scoring, all passes and one optimiser
step of full MAPO, with the decoder of `benchmarks/peers.py` and prompts that are mostly audio; prompts of text where
their length is what grows. Each shape has a process of its own; its second step is measured. An exponent is the slope
of a straight line through all points of a series, logarithm over logarithm: below 1 where a fixed part is still seen.
"""

import argparse
import multiprocessing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import peers_ours
import torch
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullLocator
from peers_protocol import Clock, peak_mib, reset_peak

from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.platform import hide_cuda_devices, initialize_parallel, install_cpu_host

TOKENS_PER_SECOND = 12.5
"""Audio tokens of the embedded encoder."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a step is about; the defaults are the base."""

    prompt_tokens: int = 120
    completion_tokens: int = 128
    group: int = 4
    prompts: int = 1
    audio: bool = True


SERIES: dict[str, tuple[str, list[tuple[float, Shape]]]] = {
    "completion": (
        "tokens of a completion",
        [(tokens, Shape(completion_tokens=tokens)) for tokens in (64, 128, 256, 512, 1024, 2048)],
    ),
    "prompt": (
        "tokens of a text prompt",
        [(tokens, Shape(prompt_tokens=tokens, audio=False)) for tokens in (64, 128, 256, 512, 1024, 2048)],
    ),
    "group": ("completions of a prompt, G", [(group, Shape(group=group)) for group in (2, 4, 8, 16, 32)]),
    "audio": (
        "seconds of audio",
        [
            (seconds, Shape(prompt_tokens=peers_ours.QUESTION + round(seconds * TOKENS_PER_SECOND)))
            for seconds in (4, 8, 16, 32, 64)
        ],
    ),
}


def main() -> None:
    """Measure every series, print a table and write the picture."""
    arguments = parse_arguments()
    found = {}
    print(f"{'':<12}{'value':>8}{'s/step':>9}{'MiB':>8}")
    for name, (_, points) in SERIES.items():
        found[name] = [(value, *measured(shape, arguments)) for value, shape in points]
        for value, seconds, mebibytes in found[name]:
            print(f"{name:<12}{value:>8g}{seconds:>9.2f}{mebibytes:>8.0f}", flush=True)
        print(f"{name:<12}{'exponent':>8}{exponent(found[name], 1):>9.2f}{exponent(found[name], 2):>8.2f}", flush=True)
    if arguments.picture is not None:
        draw(found, arguments.picture)


def measured(shape: Shape, arguments: argparse.Namespace) -> tuple[float, float]:
    """Seconds of a step, and how far its peak memory is above what libraries and model take."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        result: tuple[float, float] = pool.apply(step, (shape, arguments.layers, arguments.width, arguments.clock))
        return result


def step(shape: Shape, layers: int, width: int, clock: str) -> tuple[float, float]:
    """In a process of its own: the second step."""
    torch.set_num_threads(1)
    hide_cuda_devices()
    install_cpu_host()
    initialize_parallel()
    one = peers_ours.Step(settings_of(shape, layers, width), build_tokenizer())
    resting = peak_mib()
    # What is built on demand, the optimiser's moments among it, is there afterwards.
    one.sampling = replace(one.sampling, min_new_tokens=2, max_new_tokens=2)
    one()
    one.sampling = replace(one.sampling, min_new_tokens=shape.completion_tokens, max_new_tokens=shape.completion_tokens)
    reset_peak()
    measuring = Clock()
    one()
    return measuring.seconds()[clock], peak_mib() - resting


def settings_of(shape: Shape, layers: int, width: int) -> dict[str, Any]:
    """What `peers_ours.Step` reads."""
    digits = np.random.default_rng(0).integers(10, size=(shape.prompts, shape.prompt_tokens))
    return {
        **vars(shape),
        "method": "mapo" if shape.audio else "grpo",
        "layers": layers,
        "width": width,
        "positions": 2 * 2048,
        "rows": shape.prompts * shape.group,
        "prompts": ["".join(map(str, row)) for row in digits.tolist()],
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 0.99,
        "beta": 0.01,
        "learning_rate": 1e-6,
    }


def exponent(points: list[tuple[float, float, float]], column: int) -> float:
    """Slope of the logarithms."""
    values = np.log(np.array(points))
    return float(np.polyfit(values[:, 0], values[:, column], 1)[0])


def draw(found: dict[str, list[tuple[float, float, float]]], path: Path) -> None:
    """A panel for each series: seconds to the left, MiB to the right, both logarithmic."""
    matplotlib.use("svg")
    figure, panels = pyplot.subplots(1, len(found), figsize=(2.4 * len(found), 2.3), layout="constrained")
    for panel, (name, points) in zip(panels, found.items(), strict=True):
        values, seconds, mebibytes = zip(*points, strict=True)
        panel.loglog(values, seconds, "o-", color="#0072b2", markersize=3)
        beside = panel.twinx()
        beside.loglog(values, mebibytes, "s--", color="#d55e00", markersize=3)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xticks(values, [f"{value:g}" for value in values], fontsize=6)
        panel.set_xlabel(SERIES[name][0], fontsize=7)
        panel.set_title(f"s ~ x^{exponent(points, 1):.2f}, MiB ~ x^{exponent(points, 2):.2f}", fontsize=7)
        for axis in (panel.yaxis, beside.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
            axis.set_tick_params(labelsize=6)
    panels[0].set_ylabel("seconds a step (solid)", fontsize=7, color="#0072b2")
    beside.set_ylabel("MiB of a step (dashed)", fontsize=7, color="#d55e00")
    figure.savefig(path, format="svg", metadata={"Date": None})


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (default: %(default)s)")
    parser.add_argument("--width", type=int, default=192, help="hidden size (default: %(default)s)")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu beside other work (default: %(default)s)"
    )
    parser.add_argument("--picture", type=Path, help="write the curves there, as SVG")
    return parser.parse_args()


if __name__ == "__main__":
    main()
