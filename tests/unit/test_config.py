"""What the config accepts, and that what it refuses is named by path and value together with what would be right."""

import dataclasses
import re
from pathlib import Path

import pytest

from configuration_page import configuration_markdown
from nemo_mapo.config.compose import compose
from nemo_mapo.config.load import ConfigError, as_plain, load
from nemo_mapo.config.model import DecoderConfig, ModelConfig
from nemo_mapo.config.run import RunConfig

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
# `evaluate.yaml` and its benchmarks have a schema and a test of their own.
PRIMARY = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "evaluate")
GROUP_OPTIONS = sorted(
    f"{path.parent.relative_to(CONF)}={path.stem}"
    for path in CONF.glob("*/**/*.yaml")
    # Benchmarks are evaluate.py's; experiments need an imported model (tests/integration/test_recipes.py).
    if path.parent.name not in ("benchmark", "experiment")
)
PAPER_DATA = [
    "~warm_start",
    "data.prepared_dir=data",
    "data.tokenizer=tokenizer",
    "data.phase_steps=[3,5]",
    "trainer.mapo.max_steps=-1",
]
# What an option leaves to the user.
PAPER_SPLIT = [*PAPER_DATA[:3], "trainer.mapo.max_steps=5"]
JUDGE = ["rewards.judge.base_url=http://localhost/v1", "rewards.judge.model=judge"]
TARS = ["objective=tars", JUDGE[0], "rewards.judge.embedding_model=encoder"]
MPAR2 = [
    *(f"rewards.terms.{name}.weight=1" for name in ("format", "reviewed_answer", "perception", "reasoning_steps")),
    "rewards.terms.reviewed_answer.review_bonus=0.5",
    *(f"rewards.terms.reasoning_steps.{name}=0.5" for name in ("step_floor", "step_share")),
]
REQUIRED = {
    "data=paper_two_phase": PAPER_DATA,
    "data=prepared": ["data.prepared_dir=data/mine", "~warm_start"],
    "trainer=sft": ["data.train_ds.batch_size=32"],
    "sft": ["data.prepared_dir=data/mine"],
    "data=paper_avqa": PAPER_SPLIT,
    "data=paper_mixture": PAPER_SPLIT,
    "rewards=judge": JUDGE,
    "rewards=mpar2": [*JUDGE, *MPAR2],
    "rewards=tars": TARS,
    "rollout=trtllm": ["trainer.accelerator=gpu", "model.decoder.qk_layernorm=false"],
}
README_OVERRIDES = re.findall(r"^\| `([^`=]+=[^`]*)` \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)


def run_config(*overrides: str, primary: str = "train_mapo") -> RunConfig:
    """The validated config of a command line."""
    return load(compose(CONF / f"{primary}.yaml", overrides), RunConfig)


@pytest.mark.parametrize("primary", PRIMARY)
def test_every_primary_config_composes_and_validates(primary: str) -> None:
    assert isinstance(run_config(*REQUIRED.get(primary, []), primary=primary), RunConfig)


@pytest.mark.parametrize("option", GROUP_OPTIONS)
def test_every_option_of_every_group_composes_and_validates(option: str) -> None:
    assert isinstance(run_config(option, *REQUIRED.get(option, [])), RunConfig)


def test_an_option_asks_for_what_it_leaves_to_the_user_in_place_of_a_default() -> None:
    with pytest.raises(ConfigError) as refused:
        run_config("rewards=mpar2", *JUDGE, "rewards.terms.format.weight=1")
    asked = [line.strip().split(":")[0] for line in str(refused.value).splitlines()[1:]]
    steps = [f"reasoning_steps.{name}" for name in ("weight", "step_floor", "step_share")]
    wanted = ["reviewed_answer.weight", "reviewed_answer.review_bonus", "perception.weight", *steps]
    assert asked == [f"rewards.terms.{name}" for name in wanted]


@pytest.mark.parametrize("missing", ["data.prepared_dir", "data.tokenizer", "data.phase_steps"])
def test_a_value_that_the_papers_curriculum_leaves_to_the_user_is_asked_for(missing: str) -> None:
    given = [override for override in PAPER_DATA if not override.startswith(missing)]
    with pytest.raises(ConfigError, match=missing):
        run_config("data=paper_two_phase", *given)


def test_the_papers_curriculum_has_its_shares_and_lengths() -> None:
    phases = run_config("data=paper_two_phase", *PAPER_DATA).data.train_ds.phases
    assert [(phase.name, phase.steps) for phase in phases] == [("avqa", 3), ("mixture", 5)]
    assert [item["weight"] for item in phases[1].input_cfg] == [0.486, 0.271, 0.171, 0.071]


@pytest.mark.parametrize("override", README_OVERRIDES)
def test_every_override_of_the_readme_is_accepted(override: str) -> None:
    assert isinstance(run_config(override), RunConfig)


def test_the_readme_shows_ten_overrides() -> None:
    assert len(README_OVERRIDES) == 10


@pytest.mark.parametrize(
    ("override", "said"),
    [
        # Unknown keys, with the nearest known one.
        ("+objective.etta=1", ["objective.etta=1", "unknown key", "did you mean eta?"]),
        ("+trainer.mapo.max_step=5", ["trainer.mapo.max_step=5", "unknown key", "did you mean max_steps?"]),
        ("+data.train_ds.batchsize=2", ["data.train_ds.batchsize=2", "unknown key", "did you mean batch_size?"]),
        ("+nonsense=1", ["nonsense=1", "unknown key", "known here: seed, trainer"]),
        # Wrong types.
        ("objective.eta=high", ["objective.eta='high'", "valid number"]),
        ("model.decoder.num_layers=2.5", ["model.decoder.num_layers=2.5", "valid integer"]),
        ("model.decoder.qk_layernorm=maybe", ["model.decoder.qk_layernorm='maybe'", "valid boolean"]),
        ("objective.mask=sharp", ["objective.mask='sharp'", "'relevance', 'entropy', 'vppo' or 'none'"]),
        # Values out of range.
        ("trainer.mapo.num_rollouts_per_prompt=1", ["trainer.mapo.num_rollouts_per_prompt=1", "equal to 2"]),
        ("objective.eta=-0.1", ["objective.eta=-0.1", "greater than or equal to 0"]),
        ("rollout.sampling.top_p=1.5", ["rollout.sampling.top_p=1.5", "less than or equal to 1"]),
        # Impossible combinations.
        ("model.target_layers=[4,5]", ["model", "target_layers=[4, 5]", "[5] beyond the model", "0..4"]),
        ("model.target_layers=[3,3]", ["model", "target_layers=[3, 3]", "twice"]),
        ("model.micro_batch_size=24", ["model", "global_batch_size=32", "multiple of micro_batch_size=24"]),
        ("data.train_ds.batch_size=7", ["model.global_batch_size=32", "data.train_ds.batch_size=7", "56 completions"]),
        (
            "rollout.sampling.max_new_tokens=512",
            ["rollout.sampling.max_new_tokens=512", "below model.decoder.max_position_embeddings=512"],
        ),
        ("rollout.sampling.min_new_tokens=400", ["min_new_tokens=400", "max_new_tokens=112"]),
        ("model.decoder.num_query_groups=4", ["model.decoder", "multiple of num_query_groups=4"]),
        ("model.decoder.kv_channels=12", ["model.decoder", "kv_channels=12", "multiple of 8"]),
        ("objective.aggregation=dr_grpo", ["objective", "dr_grpo_length", "set dr_grpo_length"]),
        ("objective.clip_ratio_high=0.1", ["objective", "clip_ratio_high=0.1", "clip_ratio=0.2"]),
        # Layouts that would not equal the plain run, or have too few processes.
        ("model.tensor_model_parallel_size=2", ["1 processes", "model.tensor_model_parallel_size", "= 2"]),
        ("model.tensor_model_parallel_size=4", ["decoder.num_attention_heads=6", "tensor_model_parallel_size=4"]),
        ("model.pipeline_model_parallel_size=2", ["decoder.num_layers=5", "pipeline_model_parallel_size=2"]),
        (
            "model.pipeline_model_parallel_size=5",
            [
                "target_layers=[3, 4]",
                "the last of pipeline_model_parallel_size=5",
                "layers 4..4 of 5",
                "[3] lie before",
            ],
        ),
        ("model.context_parallel_size=2", ["model", "context_parallel_size=2", "set it to 1"]),
        ("model.expert_model_parallel_size=2", ["expert_model_parallel_size=2", "num_moe_experts=None", "set it to 1"]),
        (
            [
                *("trainer.devices=4", "model.tensor_model_parallel_size=2", "model.expert_model_parallel_size=2"),
                *("model.sequence_parallel=true", "model.decoder.num_moe_experts=2", "model.decoder.vocab_size=512"),
                *("model.micro_batch_size=8", "model.lora=null"),
            ],
            ["tensor_model_parallel_size=2", "expert_model_parallel_size=2", "gloo", "set one of them to 1"],
        ),
        ("model.sequence_parallel=true", ["model", "sequence_parallel=true", "set it to false"]),
        ("model.decoder.num_moe_experts=1", ["model.decoder.num_moe_experts=1", "greater than or equal to 2"]),
        ("trainer.devices=3", ["global_batch_size=32", "3 data-parallel ranks", "= 24"]),
        ("trainer.devices=2", ["model.micro_batch_size=32", "2 data-parallel ranks"]),
        # Nothing to train.
        (
            ["model.freeze.perception=true", "model.freeze.projector=true", "model.freeze.decoder=true"],
            ["leaves nothing to train"],
        ),
        # Training data without an end, without a beginning, or with two.
        (
            ["data.train_ds.infinite=true", "trainer.mapo.max_steps=-1"],
            ["data.train_ds.infinite=true", "set trainer.mapo.max_steps"],
        ),
        ("data.train_ds.input_cfg=[]", ["data.train_ds", "either input_cfg", "or phases"]),
        (
            ["data=synthetic_two_phase", "data.train_ds.input_cfg=[{type: lhotse, cuts_path: x}]"],
            ["data.train_ds", "either input_cfg", "only one of these"],
        ),
        (
            ["data=synthetic_two_phase", "trainer.mapo.max_steps=81"],
            ["trainer.mapo.max_steps=81", "the 80 steps of data.train_ds.phases"],
        ),
        ("data.train_ds.bucket_duration_bins=[4,2]", ["bucket_duration_bins=[4.0, 2.0]", "ascending"]),
        ("data.validation_ds.infinite=true", ["validation_ds.infinite=True", "every clip of validation_ds is scored"]),
        ("data.test_ds.max_unreadable=1", ["test_ds.max_unreadable=1", "leave it at 0"]),
        # TARS forms two groups of a prompt, and trains rows that hear nothing.
        (
            [
                "rewards=tars",
                *TARS,
                "trainer.mapo.num_rollouts_per_prompt=2",
                "model.global_batch_size=8",
                "model.micro_batch_size=8",
            ],
            ["num_rollouts_per_prompt=2", "even and at least 4"],
        ),
        (["rewards.tars={behaviour: 0}"], ["rewards.tars", "set objective=tars"]),
        (["rewards.tars={}", "objective=tars"], ["rewards", "tars.behaviour", "judge.embedding_model"]),
        # Rewards are entries: keys of earlier versions, keys and types that are not theirs.
        ("rewards.accuracy=2", ["rewards.accuracy is now rewards.terms.accuracy.weight"]),
        ("rewards.consistency_judge=model", ["is now rewards.terms.consistency.decided_by"]),
        ("rewards.terms.accuracy.wieght=2", ["rewards.terms.accuracy.wieght=2: unknown key; did you mean weight?"]),
        ("rewards.terms.acuracy.weight=2", ["rewards.terms.acuracy: type: missing", "did you mean accuracy?"]),
        ("rewards.terms.own={type: custm, weight: 1}", ["rewards.terms.own: type='custm'", "did you mean custom?"]),
        ("rewards.terms.own={type: custom, path: a.b, weight: 1}", ["rewards.terms.own", "give module and function"]),
        # vLLM servers that could not be reached.
        ("rollout.backend=vllm", ["rollout", "needs a section vllm", "rollout=vllm"]),
        (["rollout=vllm", "rollout.vllm.launch=false"], ["rollout.vllm.launch=False: unknown key", "leave it out"]),
        (["rollout=vllm", "rollout.vllm.urls=[host:8000]"], ["rollout.vllm.urls.0='host:8000'", "https?://"]),
        (
            ["rollout=vllm", "trainer.num_nodes=2", "model.micro_batch_size=16"],
            ["is reachable from this machine only", "examples/serve_vllm.py"],
        ),
        (
            ["rollout=vllm", "rollout.vllm.weight_sync=nccl"],
            ["weight_sync=nccl sends weights from a GPU", "trainer.accelerator=cpu", "weight_sync=directory"],
        ),
        ("rollout.backend=trtllm", ["backend=trtllm needs a section trtllm", "rollout=trtllm"]),
        ("rollout=trtllm", ["rollout.backend=trtllm", "trainer.accelerator=gpu, not cpu", "rollout.backend=megatron"]),
        (
            ["rollout=trtllm", "trainer.accelerator=gpu", "model.decoder.add_qkv_bias=true"],
            ["model.decoder.qk_layernorm=True, model.decoder.add_qkv_bias=True", "rollout.backend=megatron or vllm"],
        ),
        (
            ["rollout=trtllm", "rollout.sampling.repetition_penalty=1.1"],
            ["rollout.backend=trtllm", "sampling.repetition_penalty=1.1", "backend=megatron"],
        ),
        (
            ["rollout=trtllm", "rollout.sampling.min_new_tokens=3"],
            ["rollout.backend=trtllm", "sampling.min_new_tokens=3", "backend=megatron"],
        ),
        # Keys that are not there.
        ("~data.tokenizer", ["data.tokenizer", "missing"]),
        ("data.tokenizer=${nowhere}", ["data.tokenizer", "nowhere", "not found"]),
    ],
)
def test_a_bad_config_is_refused_with_path_value_and_remedy(override: str | list[str], said: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        run_config(*([override] if isinstance(override, str) else override))
    message = str(refused.value)
    assert [part for part in said if part not in message] == [], message


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*objective\.eta=-1.*objective\.beta='x'"):
        run_config("objective.eta=-1", "objective.beta=x")


def test_a_config_error_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)


def test_the_resolved_config_validates_to_itself() -> None:
    config = run_config()
    assert load(as_plain(config), RunConfig) == config


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        run_config().objective.eta = 1.0  # type: ignore[misc]


def test_steps_per_generation_counts_optimiser_steps_in_a_rollout_batch() -> None:
    config = run_config("data.train_ds.batch_size=8", "trainer.mapo.num_rollouts_per_prompt=8")
    assert config.model.global_batch_size * config.steps_per_generation == 8 * 8


@pytest.mark.parametrize(
    ("num_layers", "asked", "resolved"),
    [(48, None, (43, 44, 45, 46, 47)), (3, None, (0, 1, 2)), (5, (4, 1), (1, 4))],
)
def test_target_layers_default_to_the_last_five(
    num_layers: int, asked: tuple[int, ...] | None, resolved: tuple[int, ...]
) -> None:
    model = ModelConfig(decoder=DecoderConfig(num_layers=num_layers), target_layers=asked)
    assert model.resolved_target_layers == resolved


def test_audio_mass_is_captured_only_where_something_asks_for_it() -> None:
    silent = run_config("objective.eta=0", "objective.log_grounding=false")
    assert not silent.objective.captures_audio_mass
    assert run_config("objective.eta=0", "objective.log_grounding=true").objective.captures_audio_mass
    assert run_config("objective.eta=0.1", "objective.log_grounding=false").objective.captures_audio_mass


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("trainer.mapo.asynchronous={max_staleness: 1}", "use trainer.mapo.generation.type=one_ahead"),
        ("trainer.mapo.dynamic_sampling={}", "use trainer.mapo.generation.type=dynamic_sampling"),
        ("trainer.mapo.generation.type=asynchronous", "type='asynchronous': unknown; did you mean synchronous?"),
        ("trainer.mapo.generation.max_generation_rounds=2", "it belongs to another trainer.mapo.generation.type"),
    ],
)
def test_a_wrong_way_to_generate_is_answered_with_what_to_write(override: str, advice: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run_config(override)
    assert advice in str(refused.value)


def test_the_configuration_page_is_that_of_the_schema():
    assert (ROOT / "docs" / "configuration.md").read_text() == configuration_markdown(), (
        "run: python tests/configuration_page.py > docs/configuration.md"
    )


def test_every_key_of_the_configuration_page_has_a_meaning():
    rows = [line for line in configuration_markdown().splitlines() if line.startswith("| `")]
    assert len(rows) > 300 and [row for row in rows if row.endswith("|  |")] == []


def test_transformer_engine_needs_a_gpu_and_bfloat16():
    engine = ("model.attention_backend=transformer_engine", "model.shared_prompts=false")
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=gpu and trainer\.precision=bf16, not cpu and fp32"):
        run_config(*engine)
    with pytest.raises(ConfigError, match="set shared_prompts=false, or attention_backend=sdpa"):
        run_config(*engine, "model.shared_prompts=true")
    assert run_config(*engine, "trainer.accelerator=gpu", "trainer.precision=bf16").model.precision.fp8 is None
    with pytest.raises(ConfigError, match=r"model\.precision\.fp8=hybrid needs model\.attention_backend"):
        run_config("model.precision.fp8=hybrid")


def test_tensorrt_llm_takes_a_llama_on_a_gpu():
    llama = ["rollout=trtllm", "trainer.accelerator=gpu", "model.decoder.qk_layernorm=false"]
    assert run_config(*llama).rollout.trtllm is not None
    with pytest.raises(ConfigError, match=r"pipeline_model_parallel_size=2"):
        run_config(*llama, "trainer.devices=2", "model.pipeline_model_parallel_size=2", "model.target_layers=[4]")


def test_full_recompute_needs_a_layer_below_the_target_layers():
    with pytest.raises(ConfigError, match=r"target_layers=\[0, 4\] leave none"):
        run_config("model.decoder.recompute_granularity=full", "model.target_layers=[0,4]")
    assert run_config("model.decoder.recompute_granularity=full").model.recomputed_layers_per_stage == (3,)


def test_the_path_of_a_bad_encoder_key_is_the_one_the_user_wrote():
    with pytest.raises(ConfigError, match=r"model\.perception\.mel_bins='many'"):
        run_config("model.perception.mel_bins=many")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.surrogate=cispo", "objective.ratio=sequence"], r"surrogate=cispo .* set ratio=token"),
        (["objective.surrogate=cispo", "objective.dual_clip=3"], r"surrogate=cispo .* dual_clip=null"),
        (["objective.advantages=per_reward", "objective.overlong_buffer=20"], r"overlong_buffer=0 \(is 20\)"),
        (
            ["objective.advantages=per_reward", "trainer.mapo.generation.type=dynamic_sampling"],
            r"is incompatible with trainer\.mapo\.generation\.type=dyn",
        ),
    ],
)
def test_baselines_that_do_not_compose_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_config(*overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout=vllm"], "rollout.backend=vllm must be megatron"),
        (
            ["trainer.mapo.generation.type=dynamic_sampling"],
            "trainer.mapo.generation.type=dynamic_sampling must be syn",
        ),
        (
            ["data.train_ds.batch_size=24", "model.global_batch_size=32"],
            "must divide the batch: data.train_ds.batch_size=24",
        ),
        (["trainer.sft.save_interval=3"], "must be a multiple of val_check_interval"),
        (["data.train_ds.infinite=true"], "set trainer.sft.max_steps"),
        (["data.target.from_answer='{word}'"], "is none of {answer}, {question}"),
    ],
)
def test_supervised_training_refuses_what_it_cannot_do(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run_config("data.prepared_dir=x", *overrides, primary="sft")
    assert said in str(refused.value)


def test_a_batch_of_targets_is_an_optimiser_step() -> None:
    given = ("data.prepared_dir=x", "data.train_ds.batch_size=64")
    config = run_config(*given, primary="sft")
    assert config.supervised and config.steps_per_generation == 1
    assert run_config(*given, "model.global_batch_size=32", primary="sft").steps_per_generation == 2
