"""Generation with a KV cache against the slow way: the training forward over the whole row, one row at a time."""

from dataclasses import replace

import pytest
import torch
from jaxtyping import Float, Int
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import PADDED_ROWS, audio_batch, audio_of
from nemo_mapo.objective.logprobs import log_probs_and_entropy
from nemo_mapo.rollout.kv_cache import SlotCache
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rollout.protocol import RolloutBackend
from nemo_mapo.rollout.sampling import sampling_distribution
from nemo_mapo.rows import Completion, Prompt, Row
from support.tiny import CONTROL_TOKENS, SAMPLE_RATE, TinyAudioLLM, tiny_audio_llm, tiny_prompts

GREEDY = SamplingConfig(temperature=0, max_new_tokens=20)
FREE = SamplingConfig(temperature=1.0, max_new_tokens=20)
WHOLE_BATCH = 64


@pytest.fixture(scope="module")
def tiny() -> TinyAudioLLM:
    return tiny_audio_llm()


@pytest.fixture(scope="module", params=[True, False], ids=["tied head", "untied head"])
def either_head(request: pytest.FixtureRequest) -> TinyAudioLLM:
    return tiny_audio_llm(tied=request.param)


@pytest.fixture(params=["equal", "unequal", "some without audio"])
def prompts(request: pytest.FixtureRequest, tiny: TinyAudioLLM) -> list[Prompt]:
    without_audio = (1, 3) if request.param == "some without audio" else ()
    return tiny_prompts(tiny, num_prompts=4, equal_lengths=request.param == "equal", without_audio=without_audio)


def stop_ids(tiny: TinyAudioLLM) -> list[int]:
    """The end of turn and a few words, so that random weights stop at all sorts of lengths."""
    return [tiny.token_id(token) for token in ("<|end|>", "deep", "is", ".")]


def backend(tiny: TinyAudioLLM, *, batch_size: int = WHOLE_BATCH, stops: list[int] | None = None) -> MegatronRollout:
    return MegatronRollout(tiny.model, tiny.tokenizer, batch_size=batch_size, stop_token_ids=stops)


def seeds(count: int, first: int = 100) -> Int[Tensor, " batch"]:
    return torch.arange(first, first + count)


def generated(
    engine: MegatronRollout, prompts: list[Prompt], sampling: SamplingConfig, *, group_size: int, seeds: Tensor
) -> list[Completion]:
    """All completions, group after group."""
    groups = engine.generate(prompts, sampling, group_size=group_size, seeds=seeds)
    assert [len(group) for group in groups] == [group_size] * len(prompts)
    return [one for group in groups for one in group]


def chosen(prompts: list[Prompt], rows: list[int]) -> list[Prompt]:
    return [prompts[row] for row in rows]


def training_logits(
    tiny: TinyAudioLLM, prompt: Prompt, completion: Int[Tensor, " time"]
) -> Float[Tensor, "time vocab"]:
    """Logits that predict each token of one completion, from the training forward over the row alone."""
    row = PADDED_ROWS.lay_out([Row(prompt=prompt, token_ids=completion)], tiny.model)
    tiny.model.train()
    logits = tiny.model(row.tokens, row.audio, row.audio_row).logits[0].detach()
    return logits[len(prompt) - 1 : -1]


def test_the_megatron_backend_is_a_rollout_backend(tiny: TinyAudioLLM) -> None:
    assert isinstance(backend(tiny), RolloutBackend)


def test_greedy_generation_is_the_argmax_of_the_training_forward_token_by_token(
    either_head: TinyAudioLLM, prompts: list[Prompt]
) -> None:
    completions = generated(backend(either_head), prompts, GREEDY, group_size=1, seeds=seeds(4))
    never = [either_head.token_id(token) for token in CONTROL_TOKENS if token != "<|end|>"]
    for prompt, one in zip(prompts, completions, strict=True):
        logits = training_logits(either_head, prompt, one.token_ids)
        assert one.token_ids.tolist() == logits.index_fill(1, torch.tensor(never), float("-inf")).argmax(-1).tolist()
        assert one.sampling_log_probs.tolist() == [0.0] * len(one)


def test_behaviour_log_probs_are_those_of_the_training_forward(
    either_head: TinyAudioLLM, prompts: list[Prompt]
) -> None:
    engine = backend(either_head, stops=stop_ids(either_head))
    completions = generated(engine, prompts, FREE, group_size=6, seeds=seeds(24))
    lengths = sorted(map(len, completions))
    assert lengths[12] * 2 < lengths[-1], "some rows must outlive most, or dropping finished rows goes untested"
    for row, one in enumerate(completions):
        logits = training_logits(either_head, prompts[row // 6], one.token_ids)
        expected, _ = log_probs_and_entropy(logits[None], one.token_ids[None], chunk_size=len(one))
        torch.testing.assert_close(one.log_probs, expected[0], atol=1e-4, rtol=0)


def test_sampling_log_probs_are_those_of_the_filtered_distribution(tiny: TinyAudioLLM, prompts: list[Prompt]) -> None:
    sampling = SamplingConfig(
        temperature=1.3, top_k=8, top_p=0.9, repetition_penalty=1.2, min_new_tokens=3, max_new_tokens=10
    )
    completions = generated(backend(tiny, stops=stop_ids(tiny)), prompts, sampling, group_size=2, seeds=seeds(8))
    never = [tiny.token_id(token) for token in CONTROL_TOKENS if token != "<|end|>"]
    for row, one in enumerate(completions):
        logits = training_logits(tiny, prompts[row // 2], one.token_ids)
        for step, token in enumerate(one.token_ids.tolist()):
            drawn_from = sampling_distribution(
                logits[step : step + 1],
                sampling,
                generated=one.token_ids[None, :step],
                forbidden_ids=torch.tensor(never),
                stop_ids=torch.tensor(stop_ids(tiny)),
            )
            assert one.sampling_log_probs[step].item() == pytest.approx(drawn_from[0, token].item(), abs=1e-4)


def cached_logits(
    tiny: TinyAudioLLM, prompts: list[Prompt], completions: Int[Tensor, "batch time"]
) -> Float[Tensor, "batch time vocab"]:
    """Logits that predict each token, from a left-padded prompt and then one token at a time, both cached."""
    batch, time = completions.shape
    width = max(map(len, prompts))
    tokens = torch.zeros(batch, width, dtype=torch.int64)
    segment_ids = torch.zeros(batch, width + time, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt.token_ids
        segment_ids[row, width - len(prompt) :] = 1
    audio, audio_row = audio_of(prompts)
    tiny.model.eval()
    context = StaticInferenceContext(batch, width)
    collected = []
    with torch.no_grad():
        output = tiny.model(tokens, audio, audio_row, segment_ids=segment_ids[:, :width], inference_context=context)
        context.sequence_len_offset = width
        cache = SlotCache(batch + 2, width + time)
        cache.begin(width)
        cache.admit(context, torch.arange(batch), first=0, rotate=tiny.model.rotated_keys)
        for step in range(time):
            collected.append(output.logits[:, -1])
            output = tiny.model(
                completions[:, step : step + 1],
                audio_batch([]),
                torch.full((batch,), -1),
                segment_ids=segment_ids[:, : width + step + 1],
                inference_context=cache.context,
            )
            cache.context.sequence_len_offset += 1
    return torch.stack(collected, dim=1)


def test_logits_through_the_cache_are_those_of_the_full_forward(
    either_head: TinyAudioLLM, prompts: list[Prompt]
) -> None:
    completions = torch.randint(len(CONTROL_TOKENS), len(either_head.tokenizer), (4, 12))
    cached = cached_logits(either_head, prompts, completions)
    full = torch.stack([training_logits(either_head, prompts[row], completions[row]) for row in range(4)])
    torch.testing.assert_close(cached, full, atol=1e-4, rtol=0)


def assert_same_rows(one: list[Completion], other: list[Completion], rows: list[int]) -> None:
    """Completions of `other`, in order, are those numbered `rows` of `one`."""
    for expected, found in zip([one[row] for row in rows], other, strict=True):
        assert (found.text, found.stopped) == (expected.text, expected.stopped)
        assert torch.equal(found.token_ids, expected.token_ids)
        torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.sampling_log_probs, expected.sampling_log_probs, atol=1e-4, rtol=0)


def test_a_completion_does_not_depend_on_its_neighbours(tiny: TinyAudioLLM, prompts: list[Prompt]) -> None:
    engine = backend(tiny, stops=stop_ids(tiny))
    together = generated(engine, prompts, FREE, group_size=2, seeds=seeds(8))
    for prompt in range(4):
        rows = [2 * prompt, 2 * prompt + 1]
        alone = generated(engine, chosen(prompts, [prompt]), FREE, group_size=2, seeds=seeds(8)[rows])
        assert_same_rows(together, alone, rows)


def test_a_completion_does_not_depend_on_the_order_of_prompts(tiny: TinyAudioLLM, prompts: list[Prompt]) -> None:
    engine = backend(tiny, stops=stop_ids(tiny))
    together = generated(engine, prompts, FREE, group_size=2, seeds=seeds(8))
    order = [4, 5, 0, 1, 6, 7, 2, 3]
    reordered = generated(engine, chosen(prompts, [2, 0, 3, 1]), FREE, group_size=2, seeds=seeds(8)[order])
    assert_same_rows(together, reordered, order)


@pytest.mark.parametrize("batch_size", [2, 3, 4, 7])
def test_a_completion_does_not_depend_on_how_many_are_generated_together(
    tiny: TinyAudioLLM, prompts: list[Prompt], batch_size: int
) -> None:
    whole = generated(backend(tiny, stops=stop_ids(tiny)), prompts, FREE, group_size=2, seeds=seeds(8))
    parts = backend(tiny, stops=stop_ids(tiny), batch_size=batch_size)
    assert_same_rows(whole, generated(parts, prompts, FREE, group_size=2, seeds=seeds(8)), list(range(8)))


@pytest.mark.parametrize("batch_size", [4, 6, 10])
@pytest.mark.parametrize("sampling", [replace(FREE, repetition_penalty=1.3, min_new_tokens=3), GREEDY])
def test_prompts_that_wait_take_the_places_of_finished_rows_and_change_nothing(
    tiny: TinyAudioLLM, sampling: SamplingConfig, batch_size: int
) -> None:
    prompts = tiny_prompts(tiny, num_prompts=9, without_audio=(2, 5), seed=4)
    whole, steps_of_whole = generated_and_steps(tiny, prompts, sampling, WHOLE_BATCH)
    refilled, steps = generated_and_steps(tiny, prompts, sampling, batch_size)
    assert_same_rows(whole, refilled, list(range(18)))
    assert len(set(map(len, whole))) > 3, "the test would show nothing"
    ordered, half = sorted(prompts, key=len, reverse=True), batch_size // 2
    one_by_one = sum(
        generated_and_steps(tiny, together, sampling, batch_size)[1]
        for together in (ordered[first : first + half] for first in range(0, len(ordered), half))
    )
    assert steps_of_whole < steps < one_by_one


def generated_and_steps(
    tiny: TinyAudioLLM, prompts: list[Prompt], sampling: SamplingConfig, batch_size: int
) -> tuple[list[Completion], int]:
    """Two completions of each prompt, with seeds of its own, and how often the model read a single token a row."""
    steps: list[None] = []
    counting = tiny.model.register_forward_pre_hook(
        lambda _, arguments: steps.append(None) if arguments[0].shape[1] == 1 else None
    )
    own_seeds = torch.tensor(
        [100 + 2 * int(prompt.id.split("-")[-1]) + member for prompt in prompts for member in (0, 1)]
    )
    try:
        engine = backend(tiny, batch_size=batch_size, stops=stop_ids(tiny))
        completions = generated(engine, prompts, sampling, group_size=2, seeds=own_seeds)
    finally:
        counting.remove()
    return completions, len(steps)


@pytest.mark.parametrize("batch_size", [6, WHOLE_BATCH], ids=["with refills", "all at once"])
@pytest.mark.parametrize("sampling", [FREE, GREEDY], ids=["free", "greedy"])
def test_sharing_the_prompt_within_a_group_changes_nothing(
    tiny: TinyAudioLLM, prompts: list[Prompt], sampling: SamplingConfig, batch_size: int
) -> None:
    engine = backend(tiny, stops=stop_ids(tiny), batch_size=batch_size)
    shared = generated(engine, prompts, sampling, group_size=3, seeds=seeds(12))
    repeated = chosen(prompts, [row for row in range(4) for _ in range(3)])
    # Groups of one read a copy of the prompt's keys each.
    alone = generated(backend(tiny, stops=stop_ids(tiny)), repeated, sampling, group_size=1, seeds=seeds(12))
    assert_same_rows(shared, alone, list(range(12)))
    for one, other in zip(shared, alone, strict=True):
        torch.testing.assert_close(one.log_probs, other.log_probs, atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_sample_and_another_seed_another(tiny: TinyAudioLLM) -> None:
    prompts = tiny_prompts(tiny, num_prompts=1)
    drawn = torch.tensor([1, 2, 1, 3])
    completions = generated(backend(tiny), prompts, FREE, group_size=4, seeds=drawn)
    first, second, again, third = (tuple(one.token_ids.tolist()) for one in completions)
    assert first == again
    assert len({first, second, third}) == 3


def test_generation_leaves_the_global_random_state_alone(tiny: TinyAudioLLM) -> None:
    before = torch.get_rng_state()
    backend(tiny).generate(tiny_prompts(tiny), FREE, group_size=1, seeds=seeds(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_stopped_and_truncated_completions_are_distinguished(tiny: TinyAudioLLM) -> None:
    stops = stop_ids(tiny)
    prompts = tiny_prompts(tiny, num_prompts=4)
    completions = generated(backend(tiny, stops=stops), prompts, FREE, group_size=8, seeds=seeds(32))
    assert {one.stopped for one in completions} == {True, False}
    for one in completions:
        tokens = one.token_ids.tolist()
        assert not set(tokens[:-1]) & set(stops)
        assert (tokens[-1] in stops) == one.stopped
        assert one.stopped or len(one) == FREE.max_new_tokens
        assert one.log_probs is not None and len(one.log_probs) == len(one.sampling_log_probs) == len(one)


def test_texts_leave_out_the_stop_token_only(tiny: TinyAudioLLM) -> None:
    engine = backend(tiny, stops=stop_ids(tiny))
    for one in generated(engine, tiny_prompts(tiny), FREE, group_size=4, seeds=seeds(12)):
        assert tiny.tokenizer.encode(one.text) == one.token_ids[: len(one) - one.stopped].tolist()


def test_no_completion_stops_before_the_minimum(tiny: TinyAudioLLM) -> None:
    sampling = SamplingConfig(min_new_tokens=6, max_new_tokens=20)
    engine = backend(tiny, stops=stop_ids(tiny))
    completions = generated(engine, tiny_prompts(tiny, num_prompts=4), sampling, group_size=4, seeds=seeds(16))
    assert not any(set(one.token_ids[:6].tolist()) & set(stop_ids(tiny)) for one in completions)
    assert any(one.stopped for one in completions)


def test_forbidden_tokens_are_never_generated(tiny: TinyAudioLLM) -> None:
    words = [tiny.token_id(word) for word in ("the", "tone", "sweep")]
    engine = MegatronRollout(tiny.model, tiny.tokenizer, batch_size=WHOLE_BATCH, forbidden_token_ids=words)
    hot = SamplingConfig(temperature=5.0, max_new_tokens=40)
    completions = generated(engine, tiny_prompts(tiny, num_prompts=4), hot, group_size=16, seeds=seeds(64))
    seen = {token for one in completions for token in one.token_ids.tolist()}
    control = {tiny.token_id(token) for token in CONTROL_TOKENS} - {tiny.token_id("<|end|>")}
    assert seen == set(range(len(tiny.tokenizer))) - control - set(words)


def test_ids_beyond_the_tokenizer_are_never_generated(tiny: TinyAudioLLM) -> None:
    known = len(tiny.tokenizer)
    padded = AudioLLM(
        tiny.config, vocab_size=4 * known, audio_token_id=tiny.token_id("<|audio|>"), sample_rate=SAMPLE_RATE
    )
    engine = MegatronRollout(padded, tiny.tokenizer, batch_size=WHOLE_BATCH)
    completions = generated(engine, tiny_prompts(tiny), FREE, group_size=4, seeds=seeds(12))
    assert max(int(one.token_ids.max()) for one in completions) < known


def test_new_weights_are_sampled_from_at_once_and_the_version_travels_along() -> None:
    tiny = tiny_audio_llm(seed=4)
    engine, prompts = backend(tiny), tiny_prompts(tiny)
    before = generated(engine, prompts, GREEDY, group_size=1, seeds=seeds(3))
    tiny.model.load_state_dict(tiny_audio_llm(seed=5).model.state_dict())
    engine.weight_version += 1
    after = generated(engine, prompts, GREEDY, group_size=1, seeds=seeds(3))
    assert {one.weight_version for one in before} == {0} and {one.weight_version for one in after} == {1}
    assert [one.text for one in before] != [one.text for one in after]


def test_the_model_trains_after_generating_and_keeps_the_mode_of_every_part() -> None:
    tiny = tiny_audio_llm(seed=3)
    tiny.model.train()
    tiny.model.perception.eval()
    modes = [module.training for module in tiny.model.modules()]
    prompts = tiny_prompts(tiny, equal_lengths=True)
    completions = generated(backend(tiny), prompts, GREEDY, group_size=1, seeds=seeds(3))
    assert [module.training for module in tiny.model.modules()] == modes

    # As long as the cache was: Megatron keeps one rotary table per length.
    rows = [Row(prompt=prompt, token_ids=one.token_ids) for prompt, one in zip(prompts, completions, strict=True)]
    inputs = PADDED_ROWS.lay_out(rows, tiny.model)
    time = inputs.tokens.shape[1]
    assert time == len(prompts[0]) + GREEDY.max_new_tokens
    assert not tiny.model.language_model.rotary_pos_emb(time, packed_seq=False).is_inference()
    inputs.call(tiny.model, None).logits.sum().backward()
    gradients = [parameter.grad for parameter in tiny.model.language_model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert not any(field.is_inference() for one in completions for field in (one.token_ids, one.log_probs))


def test_the_mode_of_the_model_survives_a_failure() -> None:
    tiny = tiny_audio_llm()
    prompts = tiny_prompts(tiny)
    others = reversed([prompt.clips for prompt in prompts])
    wrong_clip = [replace(prompt, clips=clips) for prompt, clips in zip(prompts, others, strict=True)]
    with pytest.raises(ValueError, match="placeholders"):
        backend(tiny).generate(wrong_clip, FREE, group_size=1, seeds=seeds(3))
    assert tiny.model.training


def test_a_prompt_that_leaves_no_room_for_the_completion_is_refused(tiny: TinyAudioLLM) -> None:
    prompts = tiny_prompts(tiny)
    room = tiny.model.max_positions - max(map(len, prompts))
    fits = SamplingConfig(max_new_tokens=room, min_new_tokens=room)
    completions = generated(backend(tiny), prompts, fits, group_size=1, seeds=seeds(3))
    assert [len(one) for one in completions] == [room] * 3
    expected = rf"'tiny-2' has .*max_new_tokens={room + 1} within .*max_position_embeddings=128"
    with pytest.raises(ValueError, match=expected):
        backend(tiny).generate(prompts, replace(fits, max_new_tokens=room + 1), group_size=1, seeds=seeds(3))


@pytest.mark.parametrize(
    ("group_size", "given", "message"),
    [
        (5, seeds(15), "rollout.batch_size=4"),
        (0, seeds(0), "group_size=0"),
        (2, seeds(3), "got torch.int64 of shape"),
        (2, seeds(6).int(), "got torch.int32"),
    ],
)
def test_groups_and_seeds_that_do_not_fit_are_refused(
    tiny: TinyAudioLLM, group_size: int, given: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        backend(tiny, batch_size=4).generate(tiny_prompts(tiny), FREE, group_size=group_size, seeds=given)


def test_an_empty_batch_is_refused(tiny: TinyAudioLLM) -> None:
    with pytest.raises(ValueError, match="no prompts"):
        backend(tiny).generate(chosen(tiny_prompts(tiny), []), FREE, group_size=1, seeds=seeds(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stop_token_ids": [1000]}, "not in the model's vocabulary"),
        ({"stop_token_ids": []}, "there must be a stop token"),
        ({"stop_token_ids": range(39)}, "neither a stop token nor forbidden"),
        ({"stop_token_ids": [20], "forbidden_token_ids": [20]}, "cannot be forbidden"),
    ],
)
def test_stop_and_forbidden_tokens_that_make_no_sense_are_refused(
    tiny: TinyAudioLLM, arguments: dict[str, list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MegatronRollout(tiny.model, tiny.tokenizer, batch_size=4, **arguments)


def test_broken_weights_do_not_pass_for_samples() -> None:
    tiny = tiny_audio_llm()
    with torch.no_grad():
        tiny.model.language_model.decoder.final_layernorm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        backend(tiny).generate(tiny_prompts(tiny), FREE, group_size=1, seeds=seeds(3))
