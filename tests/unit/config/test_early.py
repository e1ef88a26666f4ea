"""Whether a run is to use a GPU is read from the whole composed config, not from one spelling of an override."""

from pathlib import Path

import pytest

from nemo_mapo.config.early import wants_gpu
from nemo_mapo.config.load import register_defaults

CONF = Path(__file__).parents[3] / "conf"


def asked(*arguments):
    register_defaults()
    return wants_gpu(arguments, config_dir=CONF, config_name="train_mapo")


def test_the_embedded_run_asks_for_none():
    assert not asked()


@pytest.mark.parametrize(
    "override", ["trainer.accelerator=gpu", "trainer.accelerator='gpu'", "++trainer.accelerator=gpu"]
)
def test_an_override_in_any_spelling_asks_for_one(override):
    assert asked("objective=grpo", override)


def test_a_config_group_of_the_users_own_asks_for_one(tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "mine.yaml").write_text("defaults: [defaults, _self_]\naccelerator: gpu\n")
    assert asked("--config-dir", str(tmp_path), "trainer=mine")
    assert not asked("--config-dir", str(tmp_path))


@pytest.mark.parametrize("broken", ["no override", "objectiv=grpo", "trainer=nowhere"])
def test_what_cannot_be_composed_asks_for_none_and_is_left_to_hydra(broken):
    assert not asked(broken, "trainer.accelerator=gpu")
