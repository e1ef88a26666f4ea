"""NeMo-Aligner's trainer interface: its own classes if it is installed, otherwise ours, equivalent and equally named.

NeMo-Aligner 0.7 is its last release and needs a NeMo with the `nlp` collection (up to 2.4); newer ones use ours.

    from nemo_mapo.aligner import AlignableGenerativeInterface, ScopedTimer
"""

from importlib.util import find_spec

INSTALLED = find_spec("nemo_aligner") is not None
"""Whether the classes are NeMo-Aligner's."""

if INSTALLED:
    from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface
    from nemo_aligner.utils.distributed import ScopedTimer, Timer
    from nemo_aligner.utils.train_script_utils import CustomLoggerWrapper
    from nemo_aligner.utils.trainer_utils import check_progress
else:
    from nemo_mapo.aligner.contract import (
        AlignableGenerativeInterface,
        CustomLoggerWrapper,
        ScopedTimer,
        Timer,
        check_progress,
    )

__all__ = [
    "INSTALLED",
    "AlignableGenerativeInterface",
    "CustomLoggerWrapper",
    "ScopedTimer",
    "Timer",
    "check_progress",
]
