"""Dynamic sampling: which groups are replaced, by what, and that no prompt is lost on the way or after a restart."""

from dataclasses import replace

import pytest
import torch

from nemo_mapo.config.compose import compose
from nemo_mapo.config.data import DatasetConfig, PhaseConfig
from nemo_mapo.config.load import ConfigError, load
from nemo_mapo.config.run import RunConfig, SamplingConfig
from nemo_mapo.data.dataset import PromptDataset, build_dataloader
from nemo_mapo.data.splits import manifest_path, tokenizer_path
from nemo_mapo.data.tokenizer import load_tokenizer
from nemo_mapo.embedded.synthetic import SyntheticCorpusConfig, write_corpus
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.rewards.combined import RewardTable
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rows import completions_of, training_rows
from nemo_mapo.training.dynamic_sampling import RefillingPromptStream, refill
from nemo_mapo.training.prompts import PromptPhase, PromptStream
from nemo_mapo.training.signals import token_signals
from nemo_mapo.types import Wording
from support.tiny import tiny_audio_llm, tiny_groups, tiny_problems
from tests.integration.tiny_run import ROOT

GROUP = 2
BATCH, CLIPS = 4, 16


@pytest.fixture(scope="module")
def tiny():
    tiny = tiny_audio_llm()
    tiny.model.eval()
    return tiny


class Script:
    """Rollouts of rounds 0, 1, ... of which `differ` says what rewards they get; remembers what was asked for."""

    def __init__(self, tiny, *differ):
        self.rounds = [
            tiny_groups(tiny, num_prompts=len(flags), group_size=GROUP, seed=number)
            for number, flags in enumerate(differ)
        ]
        self.differ = differ
        self.asked = []

    def score(self, groups):
        number = next(number for number, known in enumerate(self.rounds) if known is groups)
        totals = [float(reward) for flag in self.differ[number] for reward in (number, number + flag)]
        return RewardTable(by_reward={"accuracy": list(totals)}, total=totals), torch.tensor(self.differ[number])

    def sample(self, number, places, mine):
        self.asked.append((number, places, mine))
        return self.rounds[number]

    def refill(self, max_rounds):
        places = list(range(len(self.differ[0])))
        return refill(self.rounds[0], places=places, max_rounds=max_rounds, score=self.score, sample=self.sample)


def test_groups_of_equal_rewards_are_replaced_until_all_differ(tiny):
    script = Script(tiny, [True, False, False], [False, True], [True])
    found = script.refill(max_rounds=5)
    assert script.asked == [(1, [1, 2], [0, 1]), (2, [1], [0])]
    first, second, third = script.rounds
    assert found.groups == [first[0], third[0], second[1]]
    assert found.rewards.total == [0, 1, 2, 3, 1, 2]
    assert found.rewards.accuracy == found.rewards.total
    assert found.sampled == 3 + 2 + 1
    assert found.metrics == {
        "rollout/generation_rounds": 3.0,
        "rollout/kept_share": 3 / 6,
        "rollout/replaced_groups": pytest.approx(2 / 3),
    }


def test_what_still_has_equal_rewards_at_the_bound_stays_as_it_was_sampled_first(tiny):
    script = Script(tiny, [False, True, False], [False, True], [True])
    found = script.refill(max_rounds=1)
    first, second, _ = script.rounds
    assert found.groups == [first[0], first[1], second[1]]
    assert found.metrics["rollout/generation_rounds"] == 2.0
    assert found.metrics["rollout/kept_share"] == pytest.approx(2 / 5)


def test_a_batch_whose_groups_all_differ_is_left_alone(tiny):
    script = Script(tiny, [True, True])
    found = script.refill(max_rounds=3)
    assert found.groups == script.rounds[0] and script.asked == []
    assert found.metrics["rollout/kept_share"] == 1.0 and found.metrics["rollout/generation_rounds"] == 1.0


def test_groups_from_several_batches_are_trained_as_they_were_sampled(tiny):
    """Clips, prompts and completions of unequal length; a prompt without a clip among them."""
    backend = MegatronRollout(tiny.model, tiny.tokenizer, batch_size=8)

    def sampled(seed, tokens, **settings):
        problems = tiny_problems(tiny, num_prompts=3, seed=seed, **settings)
        prompts, sampling = [problem.prompt for problem in problems], SamplingConfig(max_new_tokens=tokens)
        drawn = backend.generate(prompts, sampling, group_size=GROUP, seeds=torch.arange(6) + 10 * seed)
        return [problem.answered(completions) for problem, completions in zip(problems, drawn, strict=True)]

    short, long = sampled(1, 3), sampled(2, 9, without_audio=(1,))
    kept = [long[2], short[0], long[1]]
    with torch.no_grad():
        signals = token_signals(tiny.model, training_rows(kept), head_reduction=None)
    sampled_with = [one.log_probs for one in completions_of(kept)]
    torch.testing.assert_close([one.log_probs for one in signals], sampled_with, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    install_cpu_host()
    initialize_parallel()
    path = tmp_path_factory.mktemp("dynamic_sampling") / "corpus"
    write_corpus(SyntheticCorpusConfig(train=CLIPS, validation=1, test=1), path, progress=False)
    return path


def stream(corpus, *phase_steps, rows=None):
    item = {"type": "lhotse", "cuts_path": str(manifest_path(corpus, "train"))}
    split = DatasetConfig(input_cfg=(item,), batch_size=BATCH, shuffle=True)
    if phase_steps:
        named = [PhaseConfig(name=f"{n}", input_cfg=(item,), steps=steps) for n, steps in enumerate(phase_steps)]
        split = replace(split, input_cfg=(), phases=tuple(named))
    tokenizer = load_tokenizer(tokenizer_path(corpus))
    phases = [
        PromptPhase(
            name=phase.name,
            steps=phase.steps,
            dataloader=build_dataloader(
                phase.split,
                prompt_dataset=PromptDataset(tokenizer, lambda samples: samples // 1280, Wording(), rows=rows),
                drop_last=True,
            ),
        )
        for phase in split.in_phases()
    ]
    return PromptStream(phases, BATCH)


def ids(problems):
    return [problem.example.id for problem in problems]


def drawn(prompts, draws):
    """Ids by draw: "step" is a batch, a number that many spare prompts."""
    return [ids(next(prompts) if draw == "step" else prompts.spare(draw, range(draw))) for draw in draws]


def test_batches_and_spare_prompts_of_an_epoch_are_all_of_its_prompts(corpus):
    prompts = RefillingPromptStream(stream(corpus))
    # Two batches are steps, and two are handed out one by one.
    epoch = [name for draw in drawn(prompts, ["step", 3, "step", 2, 3]) for name in draw]
    assert sorted(epoch) == sorted(set(epoch)) and len(epoch) == CLIPS
    assert prompts.epoch == 0
    assert set(ids(next(prompts))) < set(epoch) and prompts.epoch == 1


def test_without_spare_prompts_the_stream_is_the_plain_one(corpus):
    plain = stream(corpus)
    assert drawn(RefillingPromptStream(stream(corpus)), ["step"] * 6) == [ids(next(plain)) for _ in range(6)]


def test_a_rank_reads_only_its_own_spare_prompts(corpus):
    whole = RefillingPromptStream(stream(corpus))
    share = RefillingPromptStream(stream(corpus, rows=[2, 3]))
    assert ids(next(share)) == ids(next(whole))[2:]
    everything = whole.spare(6, range(6))
    mine = share.spare(6, [1, 5, 0])
    assert ids(mine) == [ids(everything)[number] for number in (1, 5, 0)]
    assert torch.equal(mine[1].prompt.clips[0], everything[5].prompt.clips[0])
    assert ids(next(share)) == ids(next(whole))[2:]


@pytest.mark.parametrize("before", [["step"], ["step", 3], ["step", 4], ["step", 3, "step", 4, "step"]])
def test_a_stream_goes_on_with_the_prompts_it_had_not_handed_out(corpus, before):
    after = [2, "step", 3, "step", 1]
    whole = drawn(RefillingPromptStream(stream(corpus)), before + after)
    first = RefillingPromptStream(stream(corpus))
    drawn(first, before)
    resumed = RefillingPromptStream(stream(corpus))
    resumed.load_state_dict(first.state_dict())
    assert drawn(resumed, after) == whole[len(before) :]


def test_spare_prompts_do_not_shorten_a_phase(corpus):
    prompts = RefillingPromptStream(stream(corpus, 2, 2))
    drawn(prompts, ["step", 4, 4, 3, "step"])
    assert prompts.phase == 0
    drawn(prompts, ["step", 1])
    assert (prompts.phase, prompts.steps_in_phase, prompts.state_dict()["reserve"]["phase"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rewards.tars={behaviour: 0}", "objective=tars"], "rewards.tars adds to them"),
        (["trainer.mapo.generation.max_generation_rounds=100000"], "max_generation_rounds=100000 exceeds 1"),
        (["trainer.mapo.generation.max_generation_rounds=0"], "max_generation_rounds=0"),
    ],
)
def test_what_cannot_be_sampled_dynamically_is_refused(overrides, said):
    asked = ["trainer.mapo.generation.type=dynamic_sampling", *overrides]
    with pytest.raises(ConfigError, match=said):
        load(compose(ROOT / "conf" / "train_mapo.yaml", asked), RunConfig)


def test_a_checkpoint_of_an_earlier_version_is_refused_with_what_it_lacks(corpus):
    state = stream(corpus).state_dict()
    del state["phase"], state["unreadable"]
    with pytest.raises(ValueError, match=r"\(phase, unreadable\).*earlier nemo-mapo"):
        stream(corpus).load_state_dict(state)
