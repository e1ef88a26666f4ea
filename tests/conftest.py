"""Shared by all tests: shape checking of the whole package, fixed seeds, one thread, no network."""

import logging
import os
import random
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A CPU host is what is supported; tests marked gpu are run with CUDA_VISIBLE_DEVICES set.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

import shape_checks

# From here on every nemo_mapo module is imported with its signatures and dataclass fields checked at run time, tensor
# shapes included. The hook stays installed: test modules are imported after this file.
install_import_hook("nemo_mapo", "shape_checks.check")

SEED = 20260527
TESTS = Path(__file__).parent
LONGEST_FIRST = ("vllm", "distributed", "integration")
"""Folders whose tests begin a run."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Any order will do: `--shuffle 7` runs files, and the tests of each, in an order drawn with that seed."""
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in a random order")


def pytest_configure(config: pytest.Config) -> None:
    """Small models are fastest, and sums are reproducible, on one thread."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU or vLLM where there is none."""
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device"
    if any(item.get_closest_marker("vllm") for item in items):
        # It imports Megatron, which other tests may do without.
        from tests.vllm.serving import PYTHON

        if not PYTHON.is_file():
            reasons["vllm"] = f"needs vLLM: `make vllm` makes {PYTHON}, or set NEMO_MAPO_VLLM_PYTHON"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    # Long files first, so that no worker is left with one at the end.
    items.sort(key=_turn)
    if (seed := config.getoption("shuffle")) is not None:
        _shuffle(items, random.Random(seed))


def _shuffle(items: list[pytest.Item], order: random.Random) -> None:
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    shuffled = list(files.values())
    order.shuffle(shuffled)
    for tests in shuffled:
        order.shuffle(tests)
    items[:] = [item for tests in shuffled for item in tests]


def _turn(item: pytest.Item) -> int:
    room = item.path.relative_to(TESTS).parts[0]
    return LONGEST_FIRST.index(room) if room in LONGEST_FIRST else len(LONGEST_FIRST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `--dist loadfile` a worker takes the files of tests/vllm together: they share a server."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/vllm" if nodeid.startswith("tests/vllm/") else super()._split_scope(nodeid)

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of several hands over what the summary says."""
    if (handed_over := vars(session.config).get("workeroutput")) is not None:
        handed_over["unchecked"] = shape_checks.unchecked


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """Take over what a worker says at its end."""
    shape_checks.unchecked |= vars(node).get("workeroutput", {}).get("unchecked", {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which functions ran without shape checks, so that none is left out silently."""
    for name, reason in sorted(shape_checks.unchecked.items()):
        terminalreporter.write_line(f"shapes not checked: {name} {reason}")


@pytest.fixture(autouse=True)
def messages_reach_caplog() -> None:
    """Our logger is as at the start of a process, whichever entry point an earlier test or fixture ran in this one."""
    logger = logging.getLogger("nemo_mapo")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
    # NeMo raises the level of whatever handlers it finds, pytest's too.
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
