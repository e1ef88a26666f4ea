"""A judge that dies in the middle of a run: the run saves and stops, and goes on there when the judge is back."""

from dataclasses import replace

import pytest
import torch

from nemo_mapo.config.compose import compose
from nemo_mapo.config.load import load
from nemo_mapo.config.run import RunConfig
from nemo_mapo.data.manifests import example_from_cut, load_cuts
from nemo_mapo.data.splits import manifest_path
from nemo_mapo.launch import Assembly
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.rewards.judged import RewardsUnavailable
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.training.run_directory import RunDirectory
from tests.chat_server import chat_reply, serve
from tests.integration.tiny_run import ROOT, command, write_tiny_corpus

__all__ = ["serve"]
pytestmark = pytest.mark.integration


class Reasoning(MegatronRollout):
    """Samples as always, but reports texts that a judge can be asked about: a tiny model writes none."""

    choices: dict[str, tuple[str, ...]]
    """By question: an engine sees none."""

    def generate(self, prompts, sampling, *, group_size, seeds):
        groups = super().generate(prompts, sampling, group_size=group_size, seeds=seeds)
        numbers = iter(seeds.tolist())
        return [
            [self.answered(one, self.choices[prompt.id][member % 2], next(numbers)) for member, one in enumerate(group)]
            for prompt, group in zip(prompts, groups, strict=True)
        ]

    @staticmethod
    def answered(completion, answer, seed):
        return replace(completion, text=f"<think>sample {seed} is {answer}.</think> {answer}", stopped=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_tiny_corpus(tmp_path_factory.mktemp("judged") / "synthetic")


def trainer_of(corpus, run_dir, server, *overrides):
    install_cpu_host()
    initialize_parallel()
    judged = ["rewards=judge", f"rewards.judge.base_url={server.base_url}", "rewards.judge.model=judge",
              "rewards.judge.max_attempts=1", "trainer.mapo.val_check_interval=0", "data.test_ds=null"]  # fmt: skip
    asked = [*command(corpus, run_dir)[2:], *judged, *overrides]
    config = load(compose(ROOT / "conf" / "train_mapo.yaml", asked), RunConfig)
    directory = RunDirectory(path=run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Assembly(config, directory).trainer
    engine = Reasoning(trainer.actor.policy, trainer.scorer.tokenizer, batch_size=8)
    examples = [example_from_cut(cut) for cut in load_cuts(manifest_path(corpus, "train"))]
    engine.choices = {example.id: example.choices for example in examples}
    trainer.actor.rollout = engine
    return trainer


def fit(trainer):
    trainer.run_timer.start_time()
    return trainer.fit()


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.actor.policy.parameters()]


def test_a_run_whose_judge_dies_ends_as_one_whose_judge_did_not(corpus, tmp_path, serve):
    def verdict(path, body):
        return chat_reply("YES" if len(body["messages"][1]["content"]) % 2 else "NO")

    server = serve(verdict)
    undisturbed = trainer_of(corpus, tmp_path / "whole", server)
    assert fit(undisturbed)

    failing = trainer_of(corpus, tmp_path / "failing", server)
    asked = len(server.requests)
    server.reply = lambda path, body: verdict(path, body) if len(server.requests) <= asked + 20 else (503, "")
    with pytest.raises(RewardsUnavailable, match=r"% of the verdicts of rewards.judge.base_url=.* are missing"):
        fit(failing)
    saved = failing.checkpoints.latest()
    assert saved is not None and saved.state["step"] == failing.step == 2

    server.reply = verdict
    resumed = trainer_of(corpus, tmp_path / "failing", server)
    resumed.resume(saved)
    assert fit(resumed)
    assert all(torch.equal(one, other) for one, other in zip(weights(undisturbed), weights(resumed), strict=True))
