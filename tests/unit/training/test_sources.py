"""Sources of rollouts: which batch a step gets, of which weights, and what a resumed run draws again."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest

from nemo_mapo.config.compose import compose
from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.config.load import load
from nemo_mapo.config.run import RunConfig, SamplingConfig
from nemo_mapo.data.dataset import PromptDataset, build_dataloader
from nemo_mapo.data.splits import manifest_path, tokenizer_path
from nemo_mapo.data.tokenizer import AUDIO, SpecialTokens, load_tokenizer
from nemo_mapo.embedded.synthetic import SyntheticCorpusConfig, write_corpus
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import MicroBatching
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rollout.protocol import OverlappingBackend, PendingCompletions
from nemo_mapo.rows import Completion, completions_of
from nemo_mapo.training.actor import MapoActor
from nemo_mapo.training.optimizer import wrap_data_parallel
from nemo_mapo.training.prompts import PromptPhase, PromptStream
from nemo_mapo.training.references import FrozenReference
from nemo_mapo.training.sources import OneAhead, Requests, RolloutSource, Sampler, StepGroups, Synchronous
from nemo_mapo.types import Wording
from support.tiny import SAMPLE_RATE, tiny_audio_llm, tiny_model_config
from tests.integration.tiny_run import ROOT

BATCH, GROUP, STEPS = 2, 2, 3
SAMPLING = SamplingConfig(max_new_tokens=3)


@dataclass
class Done:
    """Completions that are there."""

    completions: list[list[Completion]]
    abandoned: bool = False

    def result(self) -> list[list[Completion]]:
        return self.completions

    def abandon(self) -> None:
        self.abandoned = True


class AtOnce(MegatronRollout):
    """Begins by finishing: what a server does beside the trainer, in this process."""

    def begin(self, *arguments, **named) -> Done:
        self.pending = Done(self.generate(*arguments, **named))
        return self.pending


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A sampler, and what makes requests from the beginning of the data."""
    install_cpu_host()
    initialize_parallel()
    corpus = tmp_path_factory.mktemp("sources") / "corpus"
    write_corpus(SyntheticCorpusConfig(train=8, validation=1, test=1), corpus, progress=False)
    tokenizer = load_tokenizer(tokenizer_path(corpus))
    model = AudioLLM(
        tiny_model_config(),
        vocab_size=len(tokenizer),
        audio_token_id=tokenizer.get_vocab()[AUDIO],
        sample_rate=SAMPLE_RATE,
    )
    shape = [f"data.train_ds.batch_size={BATCH}", f"trainer.mapo.num_rollouts_per_prompt={GROUP}"]
    sizes = [f"model.global_batch_size={BATCH * GROUP}", f"model.micro_batch_size={GROUP}"]
    config = load(compose(ROOT / "conf" / "train_mapo.yaml", [*shape, *sizes]), RunConfig)
    item = {"type": "lhotse", "cuts_path": str(manifest_path(corpus, "train"))}
    split = DatasetConfig(input_cfg=(item,), batch_size=BATCH, shuffle=True)

    def requests() -> Requests:
        dataset = PromptDataset(tokenizer, model.num_audio_tokens, Wording())
        loader = build_dataloader(split, prompt_dataset=dataset, drop_last=True)
        return Requests(config, PromptStream([PromptPhase(name="only", dataloader=loader, steps=None)], BATCH))

    batching, special = MicroBatching(rows=GROUP), SpecialTokens.from_tokenizer(tokenizer)
    reference = FrozenReference(tiny_audio_llm().model, special, keep_placeholders=False, batching=batching)
    engine = AtOnce(model, tokenizer, batch_size=BATCH * GROUP)
    actor = MapoActor(wrap_data_parallel(model), engine, reference, config.objective, batching)
    return Sampler(actor, SAMPLING), requests


def untimed(name):
    return nullcontext()


def ahead(made, steps=STEPS) -> OneAhead:
    sampler, requests = made
    return OneAhead(requests(), sampler, untimed, steps=steps)


def given(source: RolloutSource, steps, versions) -> list[list[tuple[str, str]]]:
    """Question and text of every completion, by step."""
    return [said(source.next(step, version=version)) for step, version in zip(steps, versions, strict=True)]


def said(drawn: StepGroups) -> list[tuple[str, str]]:
    return [(group.example.id, one.text) for group in drawn.groups for one in group.completions]


def test_sources_are_what_they_say(made):
    sampler, requests = made
    assert isinstance(Synchronous(requests(), sampler, untimed), RolloutSource)
    assert isinstance(ahead(made), RolloutSource) and isinstance(sampler.actor.rollout, OverlappingBackend)
    assert isinstance(Done([]), PendingCompletions)


def test_one_ahead_gives_the_batches_of_the_synchronous_source_from_the_weights_before(made):
    sampler, requests = made
    at_once = given(Synchronous(requests(), sampler, untimed), range(STEPS), [0, 2, 4])
    source = ahead(made)
    drawn = [source.next(step, version=version) for step, version in zip(range(STEPS), [0, 2, 4], strict=True)]
    assert [said(each) for each in drawn] == at_once
    versions = [{one.weight_version for one in completions_of(each.groups)} for each in drawn]
    assert versions == [{0}, {0}, {2}]
    assert drawn[0].sampled == BATCH * GROUP and drawn[0].rewards is None
    assert drawn[0].tokens == sum(map(len, completions_of(drawn[0].groups)))


def test_a_resumed_source_begins_the_batch_again_that_was_on_its_way(made):
    whole = given(ahead(made), range(STEPS), [0, 2, 4])
    first = ahead(made)
    given(first, [0, 1], [0, 2])
    resumed = ahead(made)
    resumed.load_state_dict(first.state_dict())
    assert given(resumed, [2], [4]) == whole[2:]


def test_nothing_is_begun_beyond_the_last_step_and_what_is_begun_is_abandoned(made):
    source = ahead(made, steps=2)
    source.next(0, version=0)
    engine = made[0].actor.rollout
    source.close()
    assert engine.pending.abandoned
    before = engine.pending
    source.next(1, version=2)
    assert engine.pending is before


class Without:
    """A source of one's own: drops the groups of one question."""

    def __init__(self, inner: RolloutSource, question: str) -> None:
        self.inner = inner
        self.question = question
        self.state_dict, self.load_state_dict, self.close = inner.state_dict, inner.load_state_dict, inner.close

    def next(self, step: int, *, version: int) -> StepGroups:
        drawn = self.inner.next(step, version=version)
        return replace(drawn, groups=[group for group in drawn.groups if group.example.id != self.question])


def test_a_custom_source_wraps_another(made):
    sampler, requests = made
    first = Synchronous(requests(), sampler, untimed).next(0, version=0).groups[0].example.id
    source = Without(Synchronous(requests(), sampler, untimed), first)
    assert isinstance(source, RolloutSource)
    assert first not in [group.example.id for group in source.next(0, version=0).groups]
