"""Overrides as users of Hydra and NeMo type them, and what is wrong with them in our words, not in Hydra's."""

from pathlib import Path

import pytest

from nemo_mapo.config.compose import compose
from nemo_mapo.config.load import ConfigError, load
from nemo_mapo.config.run import RunConfig

CONF = Path(__file__).parents[3] / "conf"
ALIAS_BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 8)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


def composed(*overrides, primary=CONF / "train_mapo.yaml", search_path=()):
    return load(compose(primary, overrides, search_path=search_path), RunConfig)


def refusal(*overrides, **places):
    with pytest.raises(ConfigError) as refused:
        composed(*overrides, **places)
    said = str(refused.value)
    assert "use +" not in said and "hydra.cc" not in said and "struct" not in said
    return said


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_value_and_an_option_can_be_set_with_any_number_of_pluses(plus):
    config = composed(f"{plus}objective.eta=0.5", f"{plus}rollout=vllm", f"{plus}model.lora.rank=3")
    assert (config.objective.eta, config.rollout.backend) == (0.5, "vllm")
    assert config.model.lora is not None and config.model.lora.rank == 3


def test_what_is_removed_twice_or_not_there_by_default_is_removed():
    assert composed("~warm_start", "~warm_start").warm_start is None
    assert composed("warm_start=null").warm_start is None
    assert compose(CONF / "sft.yaml", ["~warm_start"]).get("warm_start") is None


def test_several_options_and_a_section_written_out_are_merged():
    config = compose(
        CONF / "train_mapo.yaml", ["experiment=[launcher_values,launcher_lora]", "model={target_layers: [1]}"]
    )
    assert (config.model.lora.rank, config.objective.beta, list(config.model.target_layers)) == (128, 0.02, [1])
    assert config.model.decoder.num_layers == 5


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.etta=1", "objective.etta=1: unknown key; did you mean eta?"),
        ("objectiv=grpo", "objectiv='grpo': unknown key; did you mean objective?"),
        ("objectiv.eta=1", "objectiv: unknown key; did you mean objective?"),
        ("benchmark=mmau", "benchmark: unknown key"),
        ("judge.model=x", "judge: unknown key; did you mean rewards.judge?"),
        ("objective=gpro", "objective=gpro: objective has no option gpro; did you mean grpo?"),
        ("model/perception=con", "model/perception has no option con; did you mean conv?"),
        ("model/perceptio=conv", "model/perceptio=conv: no such config group"),
        ("experiment=[paper_values,launcher]", "experiment has no option launcher; did you mean launcher_lora?"),
        ("trainer.max_steps=3", "unknown key; use trainer.mapo.max_steps (examples/sft.py: trainer.sft.max_steps)"),
        ("trainer.precision.fp8=hybrid", "trainer.precision={'fp8': 'hybrid'}"),
        ("model.num_rollouts_per_prompt=3", "did you mean trainer.mapo.num_rollouts_per_prompt?"),
        ("model.perception.mel_bin=3", "model.perception.mel_bin=3: unknown key; did you mean mel_bins?"),
        ("data.train_ds.phases=[{name: a, input_cfg: [{}], step: 3}]", "data.train_ds.phases.0.step=3: unknown key"),
        ("model=null", "model=None: a section with keys belongs here"),
        ("objective=null", "objective=None: a section with keys belongs here"),
        ("++model=3", "model has no option 3"),
        ("objective.eta.x=1", "objective.eta={'x': 1}"),
        ("data.train_ds.input_cfg={a: 1}", "data.train_ds.input_cfg={a: 1}: "),
        ("data.train_ds.input_cfg.5.type=nemo", "data.train_ds.input_cfg.5.type=nemo: list index out of range"),
        ("~data.tokenzer", "~data.tokenzer: there is no data.tokenzer to remove; did you mean data.tokenizer?"),
        ("~objective.eta=3", "objective.eta is 0.05"),
        ("~data.tokenizer", "data.tokenizer: missing; it must be set"),
        ("objective.eta=1,2", "one value is needed: a list is objective.eta=[1,2]"),
        ("data.tokenizer=a=b", "in quotes it is a text: \"data.tokenizer='a=b'\""),
        ("x=[1,2", "x=[1,2: the value cannot be read"),
        ("=1", "'=1': not key=value"),
        ("objective", "'objective': not key=value"),
        ("hydra.run.dir=.", "Hydra's own settings have no effect here"),
        ("data.tokenizer=${data.tokenizer}", "data.tokenizer: Recursive interpolation"),
        ("data.tokenizer=${oc.env:NO_SUCH_VARIABLE}", "Environment variable 'NO_SUCH_VARIABLE' not found"),
    ],
)
def test_a_wrong_override_is_answered_with_what_it_should_be(override, said):
    assert said in refusal(override)


def test_names_that_are_too_long_for_a_file_are_answered_as_others():
    name = "a" * 300
    assert "unknown key" in refusal(f"{name}=1") and "no such config group" in refusal(f"{name}/b=1")
    assert "has no option" in refusal(f"objective={name}")
    assert "no config file" in refusal(primary=CONF / f"{name}.yaml") and "no config file" in refusal(
        primary=CONF / name / "x.yaml"
    )


def test_all_overrides_that_cannot_be_read_are_named_at_once():
    said = refusal("objective=gpro", "rollout=vlm")
    assert "2 problems" in said and "did you mean grpo?" in said and "did you mean vllm?" in said


def test_a_users_own_options_and_primary_config_are_found(tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "mine.yaml").write_text("defaults: [defaults, _self_]\naccelerator: gpu\n")
    assert composed("trainer=mine", search_path=[tmp_path]).trainer.accelerator == "gpu"
    assert composed("trainer=mine", f"hydra.searchpath=[file://{tmp_path}]").trainer.accelerator == "gpu"
    assert "did you mean mine?" in refusal("trainer=min", search_path=[tmp_path])
    own = tmp_path / "own.yaml"
    own.write_text(f"defaults: [train_mapo, _self_]\nseed: 7\nhydra: {{searchpath: ['file://{CONF}']}}\n")
    assert composed("objective=grpo", primary=own).seed == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("objective: {eta: 0.1\nmodel: 3\n", "mine.yaml:2: not YAML, at column 6: "),
        ("eta: [1, 2\n", "mine.yaml:2: not YAML"),
        ("\tseed: 3\n", "mine.yaml:1: not YAML"),
        ("seed: 1\nseed: 2\n", "mine.yaml:2: not YAML, at column 1: found duplicate key seed"),
        ("defaults: [override /objectiv: grpo]\n", "objectiv"),
        ("defaults: [/model: tiny]\n", "Could not find 'model/tiny'"),
        ("- a\n", "experiment=['a']: unknown key"),
        ("seed: !!bool maybe\n", "mine.yaml: not YAML: 'maybe'"),
        ("seed: !!timestamp now\n", "mine.yaml: not YAML"),
        ("seed: !!int x\n", "mine.yaml: not YAML: invalid literal"),
        (ALIAS_BOMB, "values once its aliases (*name) are written out"),
        ("a: &a\n  b: *a\n", "values once its aliases"),
        ("a: " + "[" * 3000, "nested too deeply"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, said):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"{text}")
    assert said in refusal("experiment=mine", search_path=[tmp_path])


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path):
    assert "no config file" in refusal(primary=CONF / "train_map.yaml")
    assert "did you mean train_mapo?" in refusal(primary=CONF / "train_map.yaml")
    assert f"--config-dir {tmp_path / 'none'}: no such directory" in refusal(search_path=[tmp_path / "none"])
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    assert "config: 1 problem" in refusal("experiment=mine", search_path=[tmp_path])
