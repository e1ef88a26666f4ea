"""How the sides of `benchmarks/peers.py` answer; the standard library alone, for both environments."""

import json
import time
from pathlib import Path
from typing import Any


class Clock:
    """Seconds since it was made: `Clock().seconds()`."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> dict[str, float]:
        """By the wall, and of this process's threads together."""
        return {"wall": time.perf_counter() - self.wall, "cpu": time.process_time() - self.cpu}


def reset_peak() -> None:
    """Start the kernel's high-water mark of this process again."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Resident memory at its highest since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def ready() -> None:
    """Built, and about to wait for the first line; what is resident now is the libraries and the model."""
    reset_peak()
    answer({"resting_mib": peak_mib()})


def answer(facts: dict[str, Any]) -> None:
    """One line of JSON, told apart from what libraries print."""
    print("peer " + json.dumps(facts), flush=True)
