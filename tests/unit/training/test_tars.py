"""TARS: twins that read instead of hearing, references of the same question, alignment by hand."""

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from nemo_mapo.config.rewards import TarsConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.data.prompts import encode_prompt
from nemo_mapo.models.hidden_states import pooled_hidden_states
from nemo_mapo.models.layout import PADDED_ROWS, MicroBatching
from nemo_mapo.rewards.judge import JudgeError
from nemo_mapo.rewards.judged import RewardsUnavailable
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rows import completions_of, training_rows
from nemo_mapo.training.signals import token_signals
from nemo_mapo.training.tars import alignment, with_text_twins
from nemo_mapo.types import Wording
from support.tiny import tiny_audio_llm, tiny_problems, with_texts

WORDING = Wording(instruction="first last")

GROUP = 3
REPRESENTATION = TarsConfig(representation=1.0, behaviour=0.0)


@pytest.fixture(scope="module")
def tiny():
    tiny = tiny_audio_llm()
    tiny.model.eval()
    return tiny


@pytest.fixture(scope="module")
def problems(tiny):
    def captioned(example):
        return replace(example, caption=f"caption of {example.question}")

    return [replace(one, example=captioned(one.example)) for one in tiny_problems(tiny, num_prompts=2)]


@pytest.fixture(scope="module")
def groups(tiny, problems):
    twins = with_text_twins(problems, tiny.tokenizer, WORDING)
    backend = MegatronRollout(tiny.model, tiny.tokenizer, batch_size=12)
    sampling, seeds = SamplingConfig(max_new_tokens=6), torch.arange(4 * GROUP)
    drawn = backend.generate([twin.prompt for twin in twins], sampling, group_size=GROUP, seeds=seeds)
    return [twin.answered(completions) for twin, completions in zip(twins, drawn, strict=True)]


@pytest.fixture(scope="module")
def inputs(tiny, groups):
    return PADDED_ROWS.lay_out(training_rows(groups), tiny.model)


def aligned(tiny, groups, accuracy, config=REPRESENTATION, embedder=None, rows=4):
    return alignment(groups, accuracy, tiny.model, config, batching=MicroBatching(rows=rows), embedder=embedder)


def written_in(inputs):
    """True on the completions' own tokens."""
    mask = torch.zeros(inputs.tokens.numel(), dtype=torch.bool)
    for span in inputs.spans:
        mask[span.first + 1 : span.first + 1 + span.tokens] = True
    return mask.view(inputs.tokens.shape)


def test_every_problem_is_followed_by_one_that_reads_the_caption(tiny, problems):
    twins = with_text_twins(problems, tiny.tokenizer, WORDING)
    assert twins[::2] == problems
    for read, problem in zip(twins[1::2], problems, strict=True):
        example = problem.example
        told = replace(example, question=f"{example.caption} {example.question}")
        assert read.example is example and read.prompt.clips == ()
        assert read.prompt.token_ids.tolist() == encode_prompt(told, 0, tiny.tokenizer, WORDING)


def test_a_question_without_a_caption_is_named(tiny, problems):
    bare = [replace(one, example=replace(one.example, caption=None)) for one in problems]
    with pytest.raises(ValueError, match=f"{problems[0].example.id}: field 'caption' is missing"):
        with_text_twins(bare, tiny.tokenizer, WORDING)


def test_text_completions_are_trained_with_the_prompt_they_were_sampled_from(tiny, groups, inputs):
    text = torch.arange(4 * GROUP) // GROUP % 2 == 1
    assert (inputs.audio_row[text] == -1).all() and (inputs.audio_row[~text] >= 0).all()
    assert not (inputs.tokens[text] == tiny.model.audio_token_id).any()
    again = token_signals(tiny.model, training_rows(groups), head_reduction=None)
    for signals, one in zip(again, completions_of(groups), strict=True):
        assert torch.allclose(signals.log_probs, one.log_probs, atol=1e-4)


def test_pooled_states_are_means_of_what_the_layers_gave(tiny, inputs):
    whole = []
    layers = [module for module in tiny.model.modules() if isinstance(module, TransformerLayer)]
    handles = [layer.register_forward_hook(lambda _, __, output: whole.append(output[0])) for layer in layers]
    written = written_in(inputs)
    with torch.no_grad(), pooled_hidden_states(tiny.model, written) as pooled:
        inputs.call(tiny.model, None)
    for handle in handles:
        handle.remove()
    assert len(pooled) == len(whole) == len(layers)
    for mean, states in zip(pooled, whole, strict=True):
        for row in range(len(mean)):
            assert torch.allclose(mean[row], states[written[row], row].mean(0), atol=1e-5)


def test_a_completion_is_aligned_with_a_right_text_completion_of_its_own_question(tiny, groups):
    accuracy = [0.0] * 12
    accuracy[4] = accuracy[1] = 1.0  # a text completion of the first question; a speech one, which is no reference
    found = aligned(tiny, groups, accuracy)
    assert found.reward[:3].abs().min() > 0 and not found.reward[3:].any()
    assert found.metrics["rollout/tars_without_reference"] == 0.5
    assert found.metrics["rollout/accuracy_speech"] == pytest.approx(1 / 6)
    assert found.metrics["rollout/accuracy_text"] == pytest.approx(1 / 6)


def test_the_representation_reward_is_the_mean_cosine_over_layers(tiny, groups, inputs):
    accuracy = [0.0] * 12
    accuracy[4] = 1.0
    found = aligned(tiny, groups, accuracy)
    states = {}
    for row in (0, 4):
        written = torch.zeros_like(inputs.tokens, dtype=torch.bool)
        written[row] = written_in(inputs)[row]
        with torch.no_grad(), pooled_hidden_states(tiny.model, written) as pooled:
            inputs.call(tiny.model, None)
        states[row] = [layer[row].double() for layer in pooled]
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(states[0], states[4], strict=True)]
    assert float(found.reward[0]) == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 12])
def test_how_rows_are_batched_changes_nothing(tiny, groups, rows):
    accuracy = [1.0] * 12
    expected = aligned(tiny, groups, accuracy, rows=12).reward
    assert torch.allclose(aligned(tiny, groups, accuracy, rows=rows).reward, expected, atol=1e-5)


def test_without_a_right_text_completion_nothing_is_added(tiny, groups):
    found = aligned(tiny, groups, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0] * 2)
    assert not found.reward.any() and found.metrics["rollout/tars_without_reference"] == 1.0


class Lengths:
    """Embeds a text as (its length, 1)."""

    def embed(self, texts):
        return [[float(len(text)), 1.0] for text in texts]


def test_the_behaviour_reward_is_the_cosine_of_the_embeddings(tiny, groups):
    texts = ("", "aa", "aaa", "b" * 7, "b", "bb", *(one.text for one in completions_of(groups)[6:]))
    scripted = with_texts(groups, texts)
    accuracy = [0.0] * 12
    accuracy[3] = 1.0
    config = TarsConfig(representation=0.0, behaviour=2.0)
    found = aligned(tiny, scripted, accuracy, config, Lengths())
    cosines = [(7 * length + 1) / ((50**0.5) * (length**2 + 1) ** 0.5) for length in (0, 2, 3)]
    assert found.reward[:3].tolist() == pytest.approx([2 * cosine for cosine in cosines], abs=1e-6)


class Gone:
    """An encoder that cannot be reached."""

    def embed(self, texts):
        raise JudgeError("no route")


def test_an_unreachable_encoder_does_not_count_as_zero(tiny, groups):
    config = TarsConfig(representation=0.0, behaviour=1.0)
    with pytest.raises(RewardsUnavailable, match="no route"):
        aligned(tiny, groups, [1.0] * 12, config, Gone())
