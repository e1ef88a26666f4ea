"""Rollouts become a batch: rewards, advantages, references and gate line up with their tokens."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from nemo_mapo.config.model import OptimizerConfig
from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.config.rewards import RewardsConfig
from nemo_mapo.config.run import RolloutConfig, SamplingConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.layout import MicroBatching
from nemo_mapo.pos_gate.tagger import build_chain_tagger
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.training.actor import MapoActor
from nemo_mapo.training.optimizer import build_optimizer, wrap_data_parallel
from nemo_mapo.training.references import FrozenReference
from nemo_mapo.training.scoring import RolloutScorer
from support.tiny import tiny_audio_llm, tiny_groups, with_texts

PLAIN = ObjectiveConfig(mask="none", eta=0.0, log_grounding=False)


def scored(objective, groups=None, max_new_tokens=8, optimizer_steps=1):
    """Score rollouts of a tiny model whose reference is another tiny model, and pass over them once."""
    actor, scorer, groups = parts_of(objective, groups, max_new_tokens, optimizer_steps)
    result = scorer(groups, actor, lambda name: nullcontext())
    first = result.in_steps(optimizer_steps)[0]
    result.first_step_read(actor.training_pass(first, forward_only=True).signals)
    return actor, result


def column(result, name):
    """One signal of all rows."""
    return [vars(row)[name] for row in result.rows]


def advantages(result):
    return torch.stack(column(result, "advantages"))


def parts_of(objective, groups=None, max_new_tokens=8, optimizer_steps=1):
    """Actor, scorer and groups of `scored`."""
    tiny, frozen = tiny_audio_llm(seed=0), tiny_audio_llm(seed=1)
    tiny.model.eval()
    groups = tiny_groups(tiny) if groups is None else groups
    special = SpecialTokens.from_tokenizer(tiny.tokenizer)
    reference = FrozenReference(frozen.model, special, keep_placeholders=False, batching=MicroBatching(rows=2))
    backend = MegatronRollout(tiny.model, tiny.tokenizer, batch_size=4)
    actor = MapoActor(wrap_data_parallel(tiny.model), backend, reference, objective, MicroBatching(rows=2))
    rollout = RolloutConfig(sampling=SamplingConfig(max_new_tokens=max_new_tokens))
    scorer = RolloutScorer(
        tiny.tokenizer,
        special,
        build_chain_tagger(),
        RewardsConfig(),
        objective,
        rollout,
        optimizer_steps=optimizer_steps,
    )
    return actor, scorer, groups


def answered(texts):
    return with_texts(tiny_groups(tiny_audio_llm()), texts)


def test_advantages_follow_the_rewards_within_each_group():
    right, wrong = "<think> so it seems deep. </think> deep", "<think> so it seems low. </think> low"
    _, result = scored(ObjectiveConfig(), answered((right, wrong, wrong, wrong)))
    assert result.rewards.total[0] > result.rewards.total[1]
    assert advantages(result)[0] > 0 > advantages(result)[1]
    assert [float(reward) for reward in column(result, "accuracy_rewards")[:2]] == [1.0, 0.0]


def test_gdpo_compares_each_reward_alone_and_scales_over_the_batch():
    right, wrong = "<think> so it seems deep. </think> deep", "<think> so it seems low. </think> low"
    bare = "deep"
    objective = ObjectiveConfig(advantages="per_reward", advantage_epsilon=1e-4)
    _, result = scored(objective, answered((right, wrong, bare, right)))
    weights = RewardsConfig().weights
    raw = torch.zeros(4)
    for name, values in result.rewards.by_reward.items():
        groups = torch.tensor(values).view(2, 2)
        deviation = groups.std(dim=1, keepdim=True, correction=1) + 1e-4
        raw += weights[name] * ((groups - groups.mean(dim=1, keepdim=True)) / deviation).flatten()
    torch.testing.assert_close(advantages(result), raw / (raw.square().mean().sqrt() + 1e-4))
    assert len({tuple(values) for values in result.rewards.by_reward.values()}) > 1, "the rewards tell different things"


def test_vppo_compares_with_the_policy_without_its_audio_and_scales_advantages():
    right, wrong = "<think> so it seems deep. </think> deep", "<think> so it seems low. </think> low"
    rollouts = answered((right, wrong, wrong, right))
    _, plain = scored(ObjectiveConfig(), rollouts)
    _, result = scored(ObjectiveConfig(mask="vppo", vppo_scale_floor=0.5), rollouts)
    text_only = column(result, "text_only_log_probs")
    tiny = tiny_audio_llm(seed=0)
    own = FrozenReference(
        tiny.model,
        SpecialTokens.from_tokenizer(tiny.tokenizer),
        keep_placeholders=False,
        batching=MicroBatching(rows=1),
    )
    torch.testing.assert_close(text_only, own.text_log_probs(result.rows), rtol=1e-4, atol=1e-5)
    assert column(plain, "text_only_log_probs") == [None] * 4
    differences = [one - result.signals[row].log_probs for row, one in enumerate(text_only)]
    means = torch.stack([(one.exp() - one - 1).clamp(max=10).mean() for one in differences])
    normalised = (means - means.min()) / (means.max() - means.min())
    expected = advantages(plain) * (0.5 + normalised * 0.5 / normalised.mean())
    torch.testing.assert_close(advantages(result), expected, rtol=1e-3, atol=1e-5)


def test_a_group_of_equal_rewards_has_no_advantage_and_is_counted():
    wrong = "<think> so it seems low. </think> nothing"
    _, result = scored(ObjectiveConfig(), answered((wrong,) * 4))
    assert advantages(result).tolist() == [0.0] * 4
    assert result.metrics["rollout/equal_reward_groups"] == 1.0


def test_the_policy_and_its_reference_read_the_same_tokens():
    _, result = scored(ObjectiveConfig())
    ref, now = column(result, "ref_log_probs"), [result.signals[row].log_probs for row in range(4)]
    assert [len(one) for one in ref] == [len(one) for one in now] == [len(row.token_ids) for row in result.rows]
    assert (torch.cat(now) < 0).all() and (torch.cat(ref) < 0).all()
    assert (torch.cat(now) - torch.cat(ref)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("objective", "steps", "read"),
    [
        (ObjectiveConfig(), 1, []),
        (ObjectiveConfig(), 2, [2, 3]),
        (ObjectiveConfig(signal="log_ratio"), 1, [0, 1, 2, 3]),
        (ObjectiveConfig(vppo_scale_floor=0.5), 2, [0, 1, 2, 3]),
    ],
)
def test_only_rows_that_an_update_comes_before_are_read_before_training(objective, steps, read):
    actor, scorer, groups = parts_of(objective, optimizer_steps=steps)
    before = scorer(groups, actor, lambda name: nullcontext())
    assert list(before.signals) == read
    whole = actor.get_inference_signals(before.rows)
    first, *later = before.in_steps(steps)
    assert [row.old_log_probs for row in first] == [None] * len(first)
    old = [row.old_log_probs for rows in later for row in rows]
    torch.testing.assert_close(old, [one.log_probs for one in whole[len(first) :]], atol=1e-6, rtol=0)
    before.first_step_read(actor.training_pass(first).signals)
    assert len(before.signals) == len(whole)
    for row, one in enumerate(whole):
        torch.testing.assert_close(vars(before.signals[row]), vars(one), atol=1e-6, rtol=0)


def test_an_engine_that_cannot_say_log_pi_has_its_log_mu_recomputed_for_all_rows():
    actor, scorer, groups = parts_of(ObjectiveConfig(behaviour_clip=2.0))
    silent = [
        replace(group, completions=tuple(replace(one, log_probs=None) for one in group.completions)) for group in groups
    ]
    before = scorer(silent, actor, lambda name: nullcontext())
    drawn = [before.signals[row].drawn_log_probs for row in range(4)]
    assert all(one.any() for one in drawn)
    (first,) = before.in_steps(1)
    before.first_step_read(actor.training_pass(first).signals)
    assert all(before.signals[row].drawn_log_probs is one for row, one in enumerate(drawn))


def test_plain_grpo_asks_for_no_text_reference_no_gate_and_no_mass():
    _, result = scored(PLAIN)
    assert column(result, "text_ref_entropy_nats") == [None] * 4
    assert result.signals[0].audio_mass is None
    assert "timing/pos_gate_seconds" not in result.metrics


def test_the_soft_overlong_penalty_lowers_the_reward_of_long_completions():
    texts = ("<think> so it seems low. </think> low",) * 4
    objective = ObjectiveConfig(overlong_buffer=4)
    _, plain = scored(ObjectiveConfig(), answered(texts), max_new_tokens=4)
    _, penalised = scored(objective, answered(texts), max_new_tokens=4)
    assert advantages(plain)[:2].tolist() == [0.0, 0.0]
    assert advantages(penalised)[0] > advantages(penalised)[1]


def test_loss_and_gradient_do_not_depend_on_the_micro_batch():
    objective = ObjectiveConfig(eta=0.5, beta=0.1)
    actor, result = scored(objective)
    gradients = []
    for size in (1, 3, 4):
        actor.batching = MicroBatching(rows=size)
        actor.wrapped.zero_grad_buffer()
        loss, _ = actor.get_loss_and_metrics(result.rows, forward_only=False)
        gradients.append((loss, {n: p.main_grad.clone() for n, p in actor.policy.named_parameters()}))
    for loss, gradient in gradients[1:]:
        assert abs(loss - gradients[0][0]) < 1e-5
        for name, value in gradient.items():
            torch.testing.assert_close(value, gradients[0][1][name], atol=2e-5, rtol=1e-3, msg=name)


def test_the_attention_loss_moves_attention_and_leaves_the_output_head_alone():
    actor, result = scored(ObjectiveConfig(mask="none", eta=1.0, beta=0.0))
    none = torch.tensor(0.0)
    rows = [replace(row, advantages=none, accuracy_rewards=none) for row in result.rows]
    actor.get_loss_and_metrics(rows, forward_only=False)
    last = actor.policy.language_model.decoder.layers[-1]
    assert last.self_attention.linear_qkv.weight.main_grad.abs().max() > 0
    assert last.mlp.linear_fc2.weight.main_grad.abs().max() == 0


def test_a_loss_that_is_not_finite_gives_a_step_that_is_refused():
    actor, result = scored(ObjectiveConfig())
    optimizer = build_optimizer(actor.wrapped, OptimizerConfig(lr=1.0))
    poisoned = [replace(row, advantages=torch.tensor(torch.nan)) for row in result.rows]
    before = [parameter.detach().clone() for parameter in actor.policy.parameters()]
    loss, _ = actor.get_loss_and_metrics(poisoned, forward_only=False)
    taken = optimizer.step(lr=1.0, max_norm=1.0)
    assert math.isnan(loss) and taken.fault is not None
    assert all(torch.equal(old, now) for old, now in zip(before, actor.policy.parameters(), strict=True))
