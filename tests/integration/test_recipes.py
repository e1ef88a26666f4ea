"""The experiments of conf/experiment: the paper's values, and a model that can be built in their layout."""

from pathlib import Path

import pytest
from integration.qwen_omni_tiny import FAMILIES, qwen_tokenizer, save_tiny
from integration.recipe_ranks import trained_bytes

from nemo_mapo.config.adapters import FreezeConfig, LoraConfig
from nemo_mapo.config.compose import compose
from nemo_mapo.config.load import ConfigError, load
from nemo_mapo.config.run import RunConfig
from nemo_mapo.models.hf.convert import import_hf
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from support.ranks import run_on_ranks
from tests.integration.tiny_run import ROOT

pytestmark = pytest.mark.integration

CONF = ROOT / "conf"
RECIPES = sorted(path.stem for path in (CONF / "experiment").glob("qwen*.yaml"))
# Table 5, and what the launcher adds.
OBJECTIVE = {
    "eta": 0.1,
    "tau_base": 1.0,
    "kappa": 1.0,
    "advantage_floor": 0.1,
    "mask_clip": 5.0,
    "prefactor_clip": 3.0,
    "fail_gate_floor": 0.1,
    "fail_threshold": 0.0,
    "beta": 0.002,
    "clip_ratio": 0.2,
    "pos_tags": ("NOUN", "VERB", "ADJ", "ADV", "NUM", "X"),
}
SAMPLING = {"temperature": 1.2, "top_k": 50, "top_p": 0.99, "repetition_penalty": 1.0, "max_new_tokens": 1200}
# What the authors' launcher has otherwise.
LAUNCHER_OBJECTIVE = OBJECTIVE | {
    "eta": 0.05,
    "beta": 0.02,
    "advantage_floor": 0.02,
    "overlong_filter": True,
    "keep_placeholders": True,
}
LAUNCHER_SAMPLING = SAMPLING | {"temperature": 1.0, "repetition_penalty": 1.2}
LAUNCHER_SHAPES = [
    f"model.decoder.{shape}" for shape in ("num_layers=48", "num_attention_heads=8", "num_query_groups=4")
]
"""Of the tiny model, which its target layers and its layout need."""
GENERATION_BATCH, STEPS_PER_GENERATION = 768, 4


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of both families, as examples/import_hf.py leaves them; positions as many as a completion needs."""
    install_cpu_host()
    initialize_parallel()
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        tokenizer = qwen_tokenizer(family)
        save_tiny(folder / "original", family, tokenizer=tokenizer, vocab_size=702, max_position_embeddings=4096)
        import_hf(folder / "original", folder / "imported")
        found[family] = folder / "imported"
    return found


def recipe(name: str, imported: dict[str, Path], *overrides: str) -> RunConfig:
    model = imported["qwen3_omni_moe" if name.startswith("qwen3") else "qwen2_5_omni"]
    asked = [f"experiment={name}", *overrides]
    return load(compose(CONF / "train_mapo.yaml", asked, search_path=[model / "conf"]), RunConfig)


def left_to_the_user(name: str) -> list[str]:
    return [
        "data.prepared_dir=data",
        "data.tokenizer=tokenizer",
        "pretrained_checkpoint.restore_from_path=imported/checkpoint",
        "rewards.judge.base_url=http://localhost/v1",
        "rewards.judge.model=judge",
    ]


def shapes(name: str) -> list[str]:
    return LAUNCHER_SHAPES if name.endswith("_authors") else []


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_papers_values(name: str, imported: dict[str, Path]) -> None:
    config = recipe(name, imported, *left_to_the_user(name), *shapes(name))
    authors = name.endswith("_authors")
    objective, sampling = (LAUNCHER_OBJECTIVE, LAUNCHER_SAMPLING) if authors else (OBJECTIVE, SAMPLING)
    assert {key: getattr(config.objective, key) for key in objective} == objective
    assert {key: getattr(config.rollout.sampling, key) for key in sampling} == sampling
    if authors:
        assert config.model.target_layers == (45, 46, 47) and config.model.decoder.moe_aux_loss_coeff == 1e-4
    group = config.trainer.mapo.num_rollouts_per_prompt
    assert group == 8 and config.data.train_ds.batch_size * group == GENERATION_BATCH
    assert config.steps_per_generation == STEPS_PER_GENERATION
    assert config.trainer.mapo.max_steps == 800 and config.warm_start is None
    updates = config.trainer.mapo.max_steps * STEPS_PER_GENERATION
    assert config.model.optim.sched.warmup_steps == 0.05 * updates
    assert (config.model.lora is not None) == ("lora" in name)
    assert config.model.optim.lr == 1e-6
    if config.model.lora is not None:
        assert config.model.lora == LoraConfig(rank=128, alpha=512)
        assert config.model.resolved_freeze == FreezeConfig(perception=False, projector=False)
    weights = [item.get("weight") for item in config.data.train_ds.input_cfg]
    assert weights == ([0.486, 0.271, 0.171, 0.071] if "phase2" in name else [None])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_asks_for_what_only_the_user_can_say(name: str, imported: dict[str, Path]) -> None:
    given = left_to_the_user(name)
    with pytest.raises(ConfigError) as refused:
        recipe(name, imported, *shapes(name))
    for override in given:
        assert f"{override.split('=')[0]}: missing; it must be set" in str(refused.value)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_model_can_be_built_in_its_layout(name: str, imported: dict[str, Path]) -> None:
    config = recipe(name, imported, *left_to_the_user(name), *shapes(name))
    (trained,) = run_on_ranks(trained_bytes, 1, config)
    assert trained > 0
