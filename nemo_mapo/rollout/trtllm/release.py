"""Releases that have the engine backend, which accepts weights and prompt tables: of TensorRT-LLM, and of NeMo."""

import importlib.util
from typing import Final

from packaging.specifiers import SpecifierSet

SUPPORTED: Final = SpecifierSet(">=0.13,<1.3")
CONTAINER: Final = "nvcr.io/nvidia/nemo:25.02"
"""A container that has one."""


def refuse_release(version: str) -> None:
    """ValueError for a release without the engine backend; names one that has it.

    >>> refuse_release("0.17.0")
    """
    if not SUPPORTED.contains(version, prereleases=True):
        raise ValueError(
            f"rollout.backend=trtllm: TensorRT-LLM {version} is installed, and needed is {SUPPORTED}: releases from "
            f"1.3 on have no engine backend any more, 1.2.1 is the last one and {CONTAINER} has an earlier one; or use "
            "rollout.backend=vllm"
        )


def refuse_nemo(version: str) -> None:
    """ValueError if this NeMo has no `nemo.export`, which loads and refits the engine; names one that has it."""
    if importlib.util.find_spec("nemo.export") is None:
        raise ValueError(
            f"rollout.backend=trtllm: NeMo {version} is installed, which has no nemo.export to load and refit an "
            f"engine any more; NeMo 2.3 of constraints.txt and {CONTAINER} have it, with TensorRT-LLM {SUPPORTED}; or "
            "use rollout.backend=vllm"
        )
