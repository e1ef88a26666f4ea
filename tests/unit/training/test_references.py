"""The text-only reference never sees the audio, not even its length."""

from dataclasses import replace

import torch

from nemo_mapo.config.adapters import LoraConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.layout import MicroBatching, audio_batch
from nemo_mapo.models.lora import add_lora
from nemo_mapo.training.references import FrozenReference
from nemo_mapo.training.signals import token_signals
from support.tiny import tiny_audio_llm, tiny_rows


def equal(values, others):
    """Bit for bit, row by row."""
    return all(torch.equal(one, other) for one, other in zip(values, others, strict=True))


def heard_otherwise(rows, change):
    """The rows with every clip changed."""
    prompts = [replace(row.prompt, clips=tuple(map(change, row.prompt.clips))) for row in rows]
    return [replace(row, prompt=prompt) for row, prompt in zip(rows, prompts, strict=True)]


def reference_of(tiny, *, keep_placeholders=False):
    special = SpecialTokens.from_tokenizer(tiny.tokenizer)
    return FrozenReference(tiny.model, special, keep_placeholders=keep_placeholders, batching=MicroBatching(rows=2))


def test_text_entropies_are_those_of_the_model_given_the_text_alone():
    tiny = tiny_audio_llm()
    reference = reference_of(tiny)
    rows = tiny_rows(tiny)
    entropies = reference.text_entropy(rows)
    audio_ids = {tiny.token_id(name) for name in ("<|audio_start|>", "<|audio|>", "<|audio_end|>")}
    for row, found in zip(rows, entropies, strict=True):
        whole = [*row.prompt.token_ids.tolist(), *row.token_ids.tolist()]
        text = [token for token in whole if token not in audio_ids]
        logits = tiny.model(torch.tensor([text]), audio_batch([]), torch.tensor([-1])).logits[0].log_softmax(-1)
        expected = -(logits.exp() * logits).sum(-1)[len(text) - len(row.token_ids) - 1 : len(text) - 1]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_text_entropies_do_not_depend_on_what_is_heard_or_for_how_long():
    tiny = tiny_audio_llm()
    reference = reference_of(tiny)
    special = SpecialTokens.from_tokenizer(tiny.tokenizer)
    rows = tiny_rows(tiny)
    other = heard_otherwise(rows, lambda clip: clip.flip(0))
    assert equal(reference.text_entropy(rows), reference.text_entropy(other))
    for row in reference.text_rows(rows):
        ids = row.prompt.token_ids
        assert not torch.isin(ids, torch.tensor([special.audio_id, special.audio_start_id])).any()


def test_an_audio_token_that_the_policy_sampled_stays_in_its_completion():
    tiny = tiny_audio_llm()
    row = replace(tiny_rows(tiny)[0], token_ids=torch.tensor([20, tiny.model.audio_token_id, 21]))
    (read,) = reference_of(tiny).text_rows([row])
    assert read.token_ids is row.token_ids and not read.prompt.clips


def test_keep_placeholders_leaves_the_positions_without_audio_behind_them():
    tiny = tiny_audio_llm()
    rows = tiny_rows(tiny)
    kept = reference_of(tiny, keep_placeholders=True).text_entropy(rows)
    dropped = reference_of(tiny).text_entropy(rows)
    heard = [one.entropy_nats for one in token_signals(tiny.model, rows, head_reduction=None)]
    assert (torch.cat(kept) - torch.cat(dropped)).abs().max() > 1e-3
    assert (torch.cat(kept) - torch.cat(heard)).abs().max() > 1e-3
    louder = heard_otherwise(rows, lambda clip: clip * 3)
    assert equal(kept, reference_of(tiny, keep_placeholders=True).text_entropy(louder))


def test_the_reference_is_frozen():
    reference = reference_of(tiny_audio_llm())
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())


def test_a_reference_in_host_memory_gives_the_same_numbers():
    tiny = tiny_audio_llm()
    special = SpecialTokens.from_tokenizer(tiny.tokenizer)
    rows = tiny_rows(tiny)
    batching = MicroBatching(rows=2)
    kept = FrozenReference(tiny.model, special, keep_placeholders=False, batching=batching)
    offloaded = FrozenReference(tiny.model, special, keep_placeholders=False, batching=batching, offload=True)
    assert equal(kept.log_probs(rows), offloaded.log_probs(rows))
    assert {parameter.device.type for parameter in offloaded.model.parameters()} == {"cpu"}


def test_an_adapted_policy_is_its_own_reference_however_far_it_is_trained():
    base, policy = tiny_audio_llm(), tiny_audio_llm()
    special = SpecialTokens.from_tokenizer(base.tokenizer)
    rows = tiny_rows(base)
    add_lora(policy.model.language_model, LoraConfig(rank=2, alpha=4.0), seed=0)
    for name, parameter in policy.model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter)
    batching = MicroBatching(rows=2)
    adapted = FrozenReference(policy.model, special, keep_placeholders=False, batching=batching, adapted=True)
    plain = FrozenReference(base.model, special, keep_placeholders=False, batching=batching)
    assert equal(adapted.log_probs(rows), plain.log_probs(rows))
    assert equal(adapted.text_entropy(rows), plain.text_entropy(rows))
    now = [one.log_probs for one in token_signals(policy.model, rows, head_reduction=None)]
    assert (torch.cat(now) - torch.cat(adapted.log_probs(rows))).abs().max() > 1e-3, "the adapters are on again"


def test_a_perception_that_is_trained_beside_adapters_is_the_start_for_the_reference_only():
    base, policy = tiny_audio_llm(), tiny_audio_llm()
    rows = tiny_rows(base)
    expected = reference_of(base).log_probs(rows)
    add_lora(policy.model.language_model, LoraConfig(rank=2), seed=0)
    special = SpecialTokens.from_tokenizer(policy.tokenizer)
    batching = MicroBatching(rows=2)
    reference = FrozenReference(policy.model, special, keep_placeholders=False, batching=batching, adapted=True)
    with torch.no_grad():
        for parameter in policy.model.perception.parameters():
            parameter.add_(0.3)
    trained = {name: value.clone() for name, value in policy.model.perception.named_parameters()}
    assert equal(reference.log_probs(rows), expected)
    assert all(torch.equal(trained[name], value) for name, value in policy.model.perception.named_parameters())
    now = [one.log_probs for one in token_signals(policy.model, rows, head_reduction=None)]
    assert not equal(now, expected)
