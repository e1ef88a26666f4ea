"""The text-only reference never sees the audio, not even its length."""

from dataclasses import replace

import torch

from nemo_mapo.config.adapters import LoraConfig
from nemo_mapo.data.sequences import drop_audio, token_batch
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.lora import add_lora
from nemo_mapo.training.references import FrozenReference
from nemo_mapo.training.signals import MicroBatching, token_signals
from support.tiny import tiny_audio_llm, tiny_rows

PAD = 0


def reference_of(tiny, *, keep_placeholders=False):
    special = SpecialTokens.from_tokenizer(tiny.tokenizer)
    return FrozenReference(tiny.model, special, keep_placeholders=keep_placeholders, batching=MicroBatching(rows=2))


def test_text_entropies_are_those_of_the_model_given_the_text_alone():
    tiny = tiny_audio_llm()
    reference = reference_of(tiny)
    sequences = token_batch(tiny_rows(tiny), pad_id=PAD)
    entropies = reference.text_entropy(sequences)
    audio_ids = {tiny.token_id(name) for name in ("<|audio_start|>", "<|audio|>", "<|audio_end|>")}
    for row in range(4):
        total = int(sequences.prompt_lengths[row] + sequences.completion_lengths[row])
        text = [token for token in sequences.tokens[row, :total].tolist() if token not in audio_ids]
        logits = tiny.model(torch.tensor([text]), sequences.audio.select(torch.tensor([], dtype=torch.int64)),
                            torch.tensor([-1])).logits[0].log_softmax(-1)  # fmt: skip
        completion = int(sequences.completion_lengths[row])
        expected = -(logits.exp() * logits).sum(-1)[len(text) - completion - 1 : len(text) - 1]
        torch.testing.assert_close(entropies[row, :completion], expected, atol=1e-5, rtol=1e-5)
        assert (entropies[row, completion:] == 0).all()


def test_text_entropies_do_not_depend_on_what_is_heard_or_for_how_long():
    tiny = tiny_audio_llm()
    reference = reference_of(tiny)
    special = SpecialTokens.from_tokenizer(tiny.tokenizer)
    sequences = token_batch(tiny_rows(tiny), pad_id=PAD)
    other = replace(sequences, audio=replace(sequences.audio, waveforms=sequences.audio.waveforms.flip(1)))
    assert torch.equal(reference.text_entropy(sequences), reference.text_entropy(other))
    text = drop_audio(sequences, special)
    assert not torch.isin(text.tokens, torch.tensor([special.audio_id, special.audio_start_id])).any()


def test_keep_placeholders_leaves_the_positions_without_audio_behind_them():
    tiny = tiny_audio_llm()
    sequences = token_batch(tiny_rows(tiny), pad_id=PAD)
    kept = reference_of(tiny, keep_placeholders=True).text_entropy(sequences)
    dropped = reference_of(tiny).text_entropy(sequences)
    heard = token_signals(tiny.model, sequences, head_reduction=None).entropy_nats
    assert (kept - dropped).abs().max() > 1e-3
    assert (kept - heard).abs().max() > 1e-3
    louder = replace(sequences, audio=replace(sequences.audio, waveforms=sequences.audio.waveforms * 3))
    assert torch.equal(kept, reference_of(tiny, keep_placeholders=True).text_entropy(louder))


def test_the_reference_is_frozen():
    reference = reference_of(tiny_audio_llm())
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())


def test_a_reference_in_host_memory_gives_the_same_numbers():
    tiny = tiny_audio_llm()
    special = SpecialTokens.from_tokenizer(tiny.tokenizer)
    sequences = token_batch(tiny_rows(tiny), pad_id=PAD)
    batching = MicroBatching(rows=2)
    kept = FrozenReference(tiny.model, special, keep_placeholders=False, batching=batching)
    offloaded = FrozenReference(tiny.model, special, keep_placeholders=False, batching=batching, offload=True)
    assert torch.equal(kept.log_probs(sequences), offloaded.log_probs(sequences))
    assert {parameter.device.type for parameter in offloaded.model.parameters()} == {"cpu"}


def test_an_adapted_policy_is_its_own_reference_however_far_it_is_trained():
    base, policy = tiny_audio_llm(), tiny_audio_llm()
    special = SpecialTokens.from_tokenizer(base.tokenizer)
    sequences = token_batch(tiny_rows(base), pad_id=PAD)
    add_lora(policy.model.language_model, LoraConfig(rank=2, alpha=4.0), seed=0)
    for name, parameter in policy.model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter)
    batching = MicroBatching(rows=2)
    adapted = FrozenReference(policy.model, special, keep_placeholders=False, batching=batching, adapted=True)
    plain = FrozenReference(base.model, special, keep_placeholders=False, batching=batching)
    assert torch.equal(adapted.log_probs(sequences), plain.log_probs(sequences))
    assert torch.equal(adapted.text_entropy(sequences), plain.text_entropy(sequences))
    now = token_signals(policy.model, sequences, head_reduction=None).log_probs
    assert (now - adapted.log_probs(sequences)).abs().max() > 1e-3, "the adapters are on again"


def test_a_perception_that_is_trained_beside_adapters_is_the_start_for_the_reference_only():
    base, policy = tiny_audio_llm(), tiny_audio_llm()
    sequences = token_batch(tiny_rows(base), pad_id=PAD)
    expected = reference_of(base).log_probs(sequences)
    add_lora(policy.model.language_model, LoraConfig(rank=2), seed=0)
    special = SpecialTokens.from_tokenizer(policy.tokenizer)
    batching = MicroBatching(rows=2)
    reference = FrozenReference(policy.model, special, keep_placeholders=False, batching=batching, adapted=True)
    with torch.no_grad():
        for parameter in policy.model.perception.parameters():
            parameter.add_(0.3)
    trained = {name: value.clone() for name, value in policy.model.perception.named_parameters()}
    assert torch.equal(reference.log_probs(sequences), expected)
    assert all(torch.equal(trained[name], value) for name, value in policy.model.perception.named_parameters())
    assert not torch.equal(token_signals(policy.model, sequences, head_reduction=None).log_probs, expected)
