"""A number is finite, in the range of its kind and no boolean; a switch is true or false; a path is one."""

import dataclasses
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from pydantic import Strict

from nemo_mapo.config.analysis import AnalysisConfig
from nemo_mapo.config.evaluation import EvaluationConfig
from nemo_mapo.config.load import ConfigError, load
from nemo_mapo.config.plan import PlanConfig
from nemo_mapo.config.run import RunConfig
from tests.unit.test_config import run_config


def plain_numbers(kind: Any, path: str, found: set[str], seen: set[type]) -> None:
    """Collect the places below a type that take any number, or what only looks like a switch."""
    if get_origin(kind) is Annotated:
        bare, *notes = get_args(kind)
        if bare in (bool, int, float):
            found |= set() if any(isinstance(note, Strict) for note in notes) else {path}
        else:
            plain_numbers(bare, path, found, seen)
    elif kind in (bool, int, float):
        found.add(path)
    elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if kind in seen:
            return
        seen.add(kind)
        for name, inner in get_type_hints(kind, include_extras=True).items():
            if name in {field.name for field in dataclasses.fields(kind)}:
                plain_numbers(inner, f"{path}.{name}", found, seen)
    elif get_origin(kind) in (Union, types.UnionType, tuple, dict) and get_origin(kind) is not Literal:
        for inner in get_args(kind):
            plain_numbers(inner, path, found, seen)


def test_every_number_and_switch_of_every_config_is_of_a_kind():
    found: set[str] = set()
    for schema in (RunConfig, EvaluationConfig, AnalysisConfig, PlanConfig):
        plain_numbers(schema, schema.__name__, found, set())
    # Arguments of `vllm serve` are what vLLM takes.
    assert sorted(found) == [
        "EvaluationConfig.rollout.vllm.serve_args",
        "RunConfig.rollout.vllm.serve_args",
    ]


@pytest.mark.parametrize(
    "absurd",
    [
        "objective.fail_threshold=nan",
        "objective.eta=inf",
        "objective.beta=1e38",
        "objective.tau_base=true",
        "objective.attention_epsilon=3",
        "model.optim.lr=1e38",
        "model.optim.lr=true",
        "model.optim.lr=nan",
        "model.optim.sched.min_lr=0.5",
        "model.decoder.num_layers=true",
        "model.decoder.num_layers='5'",
        "model.decoder.hidden_size=1e3",
        "model.decoder.qk_layernorm=1",
        "model.decoder.qk_layernorm='true'",
        "model.decoder.qk_layernorm=yes",
        "trainer.mapo.max_steps=0",
        "trainer.mapo.max_steps=-2",
        "trainer.mapo.gradient_clip_val=inf",
        "trainer.mapo.val_check_interval=true",
        "trainer.devices=false",
        "data.train_ds.max_duration=inf",
        "data.train_ds.min_duration=nan",
        "data.train_ds.min_duration=31",
        "data.train_ds.shuffle=null",
        "data.train_ds.seed=-1",
        "data.train_ds.bucket_duration_bins=[1,nan]",
        "data.tokenizer=''",
        'data.tokenizer="a\\\n b"',
        "data.tokenizer=7",
        "rollout.sampling.temperature=inf",
        "rollout.sampling.repetition_penalty=1e38",
        "rollout.log_prob_alarm=nan",
        "rewards.terms.accuracy.weight=inf",
        "rewards.terms.accuracy.weight=true",
        "rewards.judge.timeout_seconds=inf",
        "rewards.judge.base_url=localhost",
        "rollout.vllm.host=../..",
        "rewards.judge.api_key_variable='my key'",
        "exp_manager.explicit_log_dir=' '",
        "exp_manager.resume_if_exists=maybe",
        "pretrained_checkpoint.restore_from_path=''",
        "seed=true",
        "seed=1.5",
        "seed=99999999999",
        "warm_start.lr=inf",
        "model=null",
        "data=null",
        "model.target_layers=[-1]",
        "model.target_layers=[true]",
    ],
)
def test_an_absurd_value_is_refused_by_its_key(absurd):
    key = absurd.split("=")[0]
    with pytest.raises(ConfigError) as refused:
        run_config(absurd)
    assert key.split(".")[0] in str(refused.value)


def test_whole_numbers_are_good_where_a_fraction_is_meant():
    config = run_config("objective.eta=1", "model.optim.weight_decay=0")
    assert (config.objective.eta, config.model.optim.weight_decay) == (1.0, 0.0)


@pytest.mark.parametrize("nothing", [None, [], "text", 3])
def test_a_config_that_is_none_is_refused(nothing):
    with pytest.raises(ConfigError):
        load(nothing, RunConfig)


@pytest.mark.parametrize(
    ("lightning", "ours"), [("32", "fp32"), ("32-true", "fp32"), ("bf16-mixed", "bf16"), ("bf16", "bf16")]
)
def test_lightnings_names_of_precisions_are_understood(lightning, ours):
    assert run_config(f"trainer.precision={lightning}").trainer.precision == ours


@pytest.mark.parametrize("name", ["bf16-true", "16-mixed", "16", "64"])
def test_a_precision_that_is_not_here_is_refused_with_one_that_is(name):
    with pytest.raises(ConfigError, match="use bf16-mixed"):
        run_config(f"trainer.precision={name}")


@pytest.mark.parametrize("all_of_them", ["auto", "-1"])
def test_all_devices_are_the_processes_that_were_started(all_of_them, monkeypatch):
    assert run_config(f"trainer.devices={all_of_them}").trainer.devices == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    two = run_config(f"trainer.devices={all_of_them}", "model.micro_batch_size=16")
    assert two.trainer.devices == 2
