"""The config of examples/evaluate.py: every shipped option composes, what is wrong is named by path."""

from pathlib import Path

import pytest

from nemo_mapo.config.compose import compose
from nemo_mapo.config.evaluation import EvaluationConfig
from nemo_mapo.config.load import ConfigError, as_plain, load

CONF = Path(__file__).parents[4] / "conf"
BENCHMARKS = sorted(path.stem for path in (CONF / "benchmark").glob("*.yaml"))


def evaluation_config(*overrides):
    return load(compose(CONF / "evaluate.yaml", overrides), EvaluationConfig)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_benchmark_composes_and_validates(benchmark):
    config = evaluation_config(f"benchmark={benchmark}")
    assert isinstance(config, EvaluationConfig)
    assert config.rollout.sampling.temperature == 0
    assert load(as_plain(config), EvaluationConfig) == config


def test_keys_of_every_section_can_be_set():
    config = evaluation_config(
        "benchmark=mmar",
        "+benchmark.fields.modality=kind",
        "+benchmark.fields.sub-category=null",
        "judge.base_url=http://localhost:8000/v1",
        "judge.model=some-judge",
        "statistics.bootstrap_samples=10",
        "data.max_clip_seconds=30",
        "shuffle_choices=7",
        "pretrained_checkpoint.restore_from_path=somewhere",
    )
    assert config.benchmark.fields == {"modality": "kind", "sub-category": None}
    assert config.benchmark.keep_defective and config.shuffle_choices == 7


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("template=xml", "template='xml'"),
        ("benchmark.name=mmlu", "benchmark.name='mmlu'"),
        ("+benchmark.file=x", "benchmark.file='x'"),
        ("judge.max_attempts=0", "judge.max_attempts=0"),
        ("data.tokenizer=${nowhere}", "nowhere"),
    ],
)
def test_a_bad_value_is_refused_by_path(override, said):
    with pytest.raises(ConfigError) as refused:
        evaluation_config(override)
    assert said in str(refused.value)
