"""The actor as its users see it: in our own trainer, and through NeMo-Aligner's interface."""

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

import nemo_mapo
from nemo_mapo.aligner import AlignableGenerativeInterface
from nemo_mapo.training import actor as actor_module
from nemo_mapo.training.alignable import AlignableMapo
from tests.integration.tiny_run import write_tiny_corpus
from tests.integration.trainers import fit, trainer_of

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "synthetic")


def test_between_the_loop_and_the_loss_there_are_only_the_trainer_and_its_actor(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks: list[list[str]] = []
    loss, package = actor_module.mapo_loss, Path(nemo_mapo.__file__).parent

    def watched(*arguments: Any) -> Any:
        files = [Path(frame.filename) for frame in traceback.extract_stack()]
        stacks.append([str(file.relative_to(package)) for file in files if package in file.parents])
        return loss(*arguments)

    monkeypatch.setattr(actor_module, "mapo_loss", watched)
    assert fit(trainer_of(corpus, tmp_path / "run", "trainer.mapo.max_steps=1"))
    # docs/architecture.md: with examples/train_mapo.py, launch.py and objective/mapo.py these are six files.
    assert list(dict.fromkeys(stacks[0])) == ["training/loop.py", "training/trainer.py", "training/actor.py"]


def test_nemo_aligners_interface_gives_what_the_actor_does(corpus: Path, tmp_path: Path) -> None:
    trainer = trainer_of(corpus, tmp_path / "run")
    actor, sampling = trainer.actor, trainer.config.rollout.sampling
    aligned = AlignableMapo(actor)
    assert isinstance(aligned, AlignableGenerativeInterface)
    aligned.prepare_for_inference()
    assert not actor.policy.training
    groups = trainer.source.next(0, version=0).groups
    asked = {"group_size": 2, "seeds": torch.arange(2)}
    drawn, expected = (one.infer([groups[0].prompt], sampling, **asked)[0] for one in (aligned, actor))
    assert [one.text for one in drawn] == [one.text for one in expected]
    scored = trainer.scorer(groups, actor, trainer.timer)
    both = [one.get_init_policy_logprobs(scored.rows) for one in (aligned, actor)]
    assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))
    aligned.finish_inference()
    aligned.prepare_for_training()
    assert actor.policy.training
    passed = [one.get_loss_and_metrics(scored.rows, True) for one in (aligned, actor)]
    assert passed[0] == passed[1] and "train/loss" in passed[0][1]
