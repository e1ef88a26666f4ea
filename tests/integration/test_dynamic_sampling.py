"""The train command with dynamic sampling: what is replaced, after a restart and on two processes as well."""

import json
import shutil

import pytest

from tests.integration.tiny_run import metrics, train, train_on_ranks, write_tiny_corpus

pytestmark = pytest.mark.integration

STEPS = 4
# Random weights answer nothing: what differs is how early a completion happens to end.
OVERRIDES = (
    "objective=grpo",
    "objective.overlong_buffer=24",
    "rollout.sampling.max_new_tokens=24",
    "trainer.mapo.num_rollouts_per_prompt=4",
    "model.global_batch_size=8",
    f"trainer.mapo.max_steps={STEPS}",
    "data.test_ds=null",
)
DYNAMIC = ("trainer.mapo.generation={type: dynamic_sampling, max_generation_rounds: 2}",)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "synthetic")


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    finished = train(corpus, run_dir, *OVERRIDES, *DYNAMIC)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return run_dir


def timeless(run_dir):
    return [
        {k: v for k, v in record.items() if not k.startswith("timing/") and k != "rollout/tokens_per_second"}
        for record in metrics(run_dir)
    ]


def test_groups_of_equal_rewards_are_replaced_and_counted(whole):
    steps = metrics(whole)[1:]
    assert len(steps) == STEPS
    assert any(record["rollout/replaced_groups"] > 0 for record in steps), "the test would show nothing"
    for record in steps:
        assert 1 <= record["rollout/generation_rounds"] <= 3
        # Of a batch's four groups, those that differ are all that were found among the sampled ones.
        sampled = 4 * (1 - record["rollout/equal_reward_groups"]) / max(record["rollout/kept_share"], 1e-9)
        assert record["rollout/kept_share"] == 0 or 4 <= round(sampled) <= 12
        assert record["rollout/generation_rounds"] == 3 or record["rollout/equal_reward_groups"] == 0
        assert record["rollout/log_prob_gap"] < 1e-3


def test_a_run_continued_from_a_checkpoint_ends_as_one_that_was_not_stopped(corpus, whole, tmp_path):
    run_dir = tmp_path / "continued"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / f"step_{STEPS:06d}")
    resumed = train(corpus, run_dir, *OVERRIDES, *DYNAMIC, "exp_manager.resume_if_exists=true")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert timeless(run_dir) == timeless(whole)
    assert (run_dir / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()


@pytest.mark.distributed
def test_two_processes_replace_what_one_replaces(corpus, whole, tmp_path):
    run_dir = tmp_path / "two"
    finished = train_on_ranks(2, corpus, run_dir, *OVERRIDES, *DYNAMIC)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for mine, one in zip(metrics(run_dir)[1:], metrics(whole)[1:], strict=True):
        for name in ("generation_rounds", "kept_share", "replaced_groups", "equal_reward_groups", "reward_mean"):
            assert mine[f"rollout/{name}"] == pytest.approx(one[f"rollout/{name}"], abs=1e-5), (mine["step"], name)
        assert mine["train/loss"] == pytest.approx(one["train/loss"], rel=1e-3, abs=1e-4)


def test_the_trained_group_is_the_one_that_is_shown(whole):
    records = [json.loads(line) for line in (whole / "rollouts.jsonl").open()]
    for step, record in ((record["step"], record) for record in metrics(whole)[1:]):
        rewards = [one["reward"]["total"] for one in records if one["step"] == step and one["split"] == "train"]
        if record["rollout/equal_reward_groups"] == 0:
            assert len(set(rewards)) == 2
