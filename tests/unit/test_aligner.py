"""The contract that stands in for NeMo-Aligner's where it is not installed, held against NeMo-Aligner's own."""

import inspect
from itertools import product

import pytest

from nemo_mapo import aligner
from nemo_mapo.aligner import contract
from nemo_mapo.platform import initialize_parallel, install_cpu_host

REASON = "NeMo-Aligner is not installed: it needs a NeMo up to 2.4"
their_interface = pytest.importorskip("nemo_aligner.models.alignable_interface", reason=REASON)
their_timers = pytest.importorskip("nemo_aligner.utils.distributed", reason=REASON)
their_loggers = pytest.importorskip("nemo_aligner.utils.train_script_utils", reason=REASON)
their_progress = pytest.importorskip("nemo_aligner.utils.trainer_utils", reason=REASON).check_progress


def test_with_nemo_aligner_installed_its_own_classes_are_used() -> None:
    assert aligner.INSTALLED
    assert aligner.AlignableGenerativeInterface is their_interface.AlignableGenerativeInterface
    assert aligner.Timer is their_timers.Timer


def test_an_actor_of_one_contract_is_an_actor_of_the_other() -> None:
    ours, theirs = contract.AlignableGenerativeInterface, their_interface.AlignableGenerativeInterface
    assert ours.__abstractmethods__ == theirs.__abstractmethods__
    assert public(ours) == public(theirs)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (contract.Timer, their_timers.Timer),
        (contract.ScopedTimer, their_timers.ScopedTimer),
        (contract.CustomLoggerWrapper, their_loggers.CustomLoggerWrapper),
    ],
)
def test_utilities_have_the_methods_of_nemo_aligners(ours: type, theirs: type) -> None:
    assert public(ours) == public(theirs)


def test_when_to_validate_and_save_is_decided_alike() -> None:
    checked = 0
    for step, validate, save, batches, late in product(
        range(13), (-1, 0, 1, 3), (-1, 0, 3, 6), (0.0, 1.0, None), (False, True)
    ):
        arguments = (step, 12, validate, save, batches, late)
        try:
            expected = their_progress(*arguments)
        except AssertionError:
            with pytest.raises(AssertionError, match="must be divisible"):
                contract.check_progress(*arguments)
            continue
        assert contract.check_progress(*arguments) == expected, arguments
        checked += 1
    assert checked > 500


def test_a_section_is_timed_once_until_its_time_is_taken() -> None:
    for timer in (
        contract.ScopedTimer(reduction="mean", sync_cuda=False, buffer_size=1),
        their_timers.ScopedTimer(reduction="mean", sync_cuda=False, buffer_size=1),
    ):
        with timer("step"):
            pass
        assert list(timer.consume_durations()) == ["step"]
        with timer("step"):
            pass
        with pytest.raises(ValueError, match="step"), timer("step"):
            pass


def test_a_time_limit_is_counted_from_the_start_of_the_clock() -> None:
    install_cpu_host()
    initialize_parallel()
    for kind in (contract.Timer, their_timers.Timer):
        over, never = kind("00:00:00:00"), kind(None)
        over.start_time()
        never.start_time()
        assert over.is_finished()
        assert not never.is_finished()
        day = kind("01:00:00:10")
        day.start_time()
        assert 86400 < day.get_time_remaining() <= 86410


def test_loggers_are_called_if_they_have_the_method() -> None:
    class Metrics:
        def __init__(self) -> None:
            self.seen: list[object] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None) -> None:
            self.seen.append((metrics, step))

    for kind in (contract.CustomLoggerWrapper, their_loggers.CustomLoggerWrapper):
        logger = Metrics()
        wrapper = kind([logger, object()])
        wrapper.log_metrics({"loss": 1.0}, step=3, prefix="train/")
        wrapper.log_table(key="rollouts", columns=[], data=[])
        wrapper.finalize()
        assert logger.seen == [({"train/loss": 1.0}, 3)]


def public(kind: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(kind, callable) if not name.startswith("_")}
