"""An evaluation directory goes on from what it holds, and refuses what was made otherwise."""

import pytest

from nemo_mapo.evaluation.benchmarks.directory import EvaluationDirectory
from nemo_mapo.evaluation.benchmarks.predictions import Prediction
from tests.unit.evaluation.benchmarks.published import loaded, mmau_record

SETTINGS = {"seed": 0, "rollout": {"batch_size": 4, "sampling": {"temperature": 0.0}}, "judge": {"model": None}}


@pytest.fixture
def benchmark(tmp_path):
    return loaded(tmp_path / "mmau.json", "mmau", [mmau_record(name) for name in "abc"])


@pytest.fixture
def directory(tmp_path):
    return EvaluationDirectory(tmp_path / "run")


def test_appended_predictions_are_read_back(directory, benchmark):
    first, second = Prediction(id="a", completion="Dog \u2028 x"), Prediction(id="b", completion="C", finished=False)
    with directory.opened(SETTINGS):
        directory.append([first])
        directory.append([second])
        assert directory.read(benchmark) == {"a": first, "b": second}


def test_a_truncated_line_is_dropped_and_rewritten(directory, benchmark):
    with directory.opened(SETTINGS):
        directory.append([Prediction(id="a", completion="Dog")])
    with directory.predictions.open("a") as file:
        file.write('{"id": "b", "comple')
    with directory.opened(SETTINGS):
        assert set(directory.read(benchmark)) == {"a"}
        directory.append([Prediction(id="b", completion="Cat")])
        assert set(directory.read(benchmark)) == {"a", "b"}


def test_predictions_of_another_config_are_refused_by_key(directory):
    with directory.opened(SETTINGS):
        directory.append([Prediction(id="a", completion="Dog")])
    warmer = {**SETTINGS, "rollout": {"batch_size": 4, "sampling": {"temperature": 1.0}}}
    with (
        pytest.raises(ValueError, match=r"rollout\.sampling\.temperature: 0\.0 then, 1\.0 now"),
        directory.opened(warmer),
    ):
        pass


def test_predictions_of_unknown_origin_are_refused(directory):
    directory.path.mkdir()
    directory.append([Prediction(id="a", completion="Dog")])
    with pytest.raises(ValueError, match="another evaluation"), directory.opened(SETTINGS):
        pass


def test_what_has_no_part_in_the_answers_may_change(directory):
    with directory.opened(SETTINGS):
        directory.append([Prediction(id="a", completion="Dog")])
    faster = {**SETTINGS, "rollout": {**SETTINGS["rollout"], "batch_size": 64}, "judge": {"model": "judge"}}
    with directory.opened(faster):
        pass


def test_two_evaluations_do_not_share_a_directory(directory):
    second = EvaluationDirectory(directory.path)
    running = pytest.raises(ValueError, match="another evaluation is running")
    with directory.opened(SETTINGS), running, second.opened(SETTINGS):
        pass


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    directory = EvaluationDirectory(tmp_path / "file" / "run")
    with pytest.raises(ValueError, match=r"output_dir=.*cannot write there"), directory.opened(SETTINGS):
        pass
