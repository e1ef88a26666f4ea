"""A checkpoint of one layout is continued in another, and the loss goes on as if nothing had changed."""

from pathlib import Path

import pytest

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.rows import ScoredRow
from support.layouts import Layout, dense_config, moe_config, relative_figure, train, write_start
from support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

STEPS = 3
TOLERANCE = 1e-4
"""Of the loss after some steps: rounding grows with every update."""
PLAIN = Layout(rows=4)
TENSOR_2 = Layout(name="tensor 2", ranks=2, model={"tensor_model_parallel_size": 2}, rows=4)
PIPELINE_2 = Layout(name="pipeline 2", ranks=2, model={"pipeline_model_parallel_size": 2}, rows=4)
DATA_2 = Layout(name="data 2", ranks=2, rows=4)
EXPERT_2 = Layout(name="expert 2", ranks=2, model={"expert_model_parallel_size": 2}, rows=4)
TENSOR_2_SEQUENCE = Layout(
    name="tensor 2, sequence", ranks=2, model={"tensor_model_parallel_size": 2, "sequence_parallel": True}, rows=4
)


class Course:
    """Six steps in the plain layout, and the first three in that which writes the checkpoint."""

    def __init__(self, folder: Path, config: ModelConfig, writer: Layout) -> None:
        self.config = config
        self.folder = folder
        start = str(folder / "start")
        self.batch: list[ScoredRow]
        (self.batch,) = run_on_ranks(write_start, 1, start, config)
        self.expected = self.run(PLAIN, start, 2 * STEPS, "whole")
        self.written = self.run(writer, start, STEPS, "half")

    def run(self, layout: Layout, start: str, steps: int, save: str) -> list[float]:
        (losses, *others) = run_on_ranks(
            train, layout.ranks, layout, self.config, start, self.batch, steps, str(self.folder / save)
        )
        assert all(other == losses for other in others), "ranks disagree about the loss"
        return losses


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Course:
    return Course(tmp_path_factory.mktemp("dense"), dense_config(), TENSOR_2)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Course:
    return Course(tmp_path_factory.mktemp("experts"), moe_config(), TENSOR_2_SEQUENCE)


def continues(course: Course, reader: Layout) -> None:
    assert course.written == pytest.approx(course.expected[:STEPS], rel=TOLERANCE)
    continued = course.run(reader, str(course.folder / "half"), STEPS, f"then_{reader.name}")
    differences = [
        relative_figure(loss, expected, max(map(abs, course.expected)))
        for loss, expected in zip(continued, course.expected[STEPS:], strict=True)
    ]
    assert max(differences) <= TOLERANCE
    fresh = abs(course.expected[STEPS] - course.expected[0])
    assert fresh > 10 * TOLERANCE * max(map(abs, course.expected)), "the steps must matter"


@pytest.mark.parametrize("reader", [PLAIN, PIPELINE_2, DATA_2], ids=lambda layout: layout.name)
def test_what_tensor_parallel_ranks_saved_goes_on_in_another_layout(dense: Course, reader: Layout) -> None:
    continues(dense, reader)


@pytest.mark.parametrize("reader", [EXPERT_2, PLAIN], ids=lambda layout: layout.name)
def test_experts_that_tensor_parallel_ranks_saved_go_on_in_another_layout(experts: Course, reader: Layout) -> None:
    continues(experts, reader)
