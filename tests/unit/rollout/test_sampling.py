"""The sampling distribution by hand-computed cases, and the draw against the distribution."""

import math

import pytest
import torch
from torch import Tensor

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.rollout.sampling import row_uniforms, sample, sampling_distribution, token_log_probs

NOTHING = torch.tensor([], dtype=torch.int64)
IMPOSSIBLE = float("-inf")
LARGEST_UNIFORM = math.nextafter(1.0, 0.0)


def distribution(
    probabilities: list[float],
    *,
    generated: tuple[int, ...] = (),
    forbidden: tuple[int, ...] = (),
    stops: tuple[int, ...] = (),
    **sampling: float,
) -> list[float]:
    """Probabilities sampled from when the model's are `probabilities`."""
    log_probs = sampling_distribution(
        torch.tensor([probabilities]).log(),
        SamplingConfig(**sampling),
        generated=torch.tensor([generated], dtype=torch.int64).reshape(1, -1),
        forbidden_ids=torch.tensor(forbidden, dtype=torch.int64),
        stop_ids=torch.tensor(stops, dtype=torch.int64),
    )
    return log_probs.exp()[0].tolist()


def test_default_sampling_is_the_model_itself() -> None:
    assert distribution([0.5, 0.3, 0.2]) == pytest.approx([0.5, 0.3, 0.2])


def test_temperature_is_an_exponent_on_probabilities() -> None:
    assert distribution([0.8, 0.2], temperature=0.5) == pytest.approx([0.64 / 0.68, 0.04 / 0.68])


def test_temperature_zero_takes_the_most_likely_token_with_certainty() -> None:
    assert distribution([0.3, 0.5, 0.2], temperature=0) == [0, 1, 0]


def test_temperature_zero_takes_the_first_of_equals() -> None:
    assert distribution([0.2, 0.4, 0.4], temperature=0) == [0, 1, 0]


def test_top_k_keeps_k_tokens_and_renormalises() -> None:
    assert distribution([0.4, 0.1, 0.2, 0.3], top_k=2) == pytest.approx([4 / 7, 0, 0, 3 / 7])


def test_top_k_keeps_exactly_k_of_equal_tokens() -> None:
    assert distribution([0.25, 0.25, 0.25, 0.25], top_k=2) == pytest.approx([0.5, 0.5, 0, 0])


def test_top_k_beyond_the_vocabulary_keeps_everything() -> None:
    assert distribution([0.5, 0.3, 0.2], top_k=7) == pytest.approx([0.5, 0.3, 0.2])


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.39, [1, 0, 0]), (0.41, [4 / 7, 3 / 7, 0]), (0.69, [4 / 7, 3 / 7, 0]), (0.71, [0.4, 0.3, 0.3])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[float]) -> None:
    assert distribution([0.4, 0.3, 0.3], top_p=top_p) == pytest.approx(kept)


def test_top_p_counts_the_probability_that_top_k_left() -> None:
    # After top-k 0.5 and 0.25 become 2/3 and 1/3: the first alone reaches 0.6, though it has 0.5 to begin with.
    assert distribution([0.5, 0.25, 0.25], top_k=2, top_p=0.6) == pytest.approx([1, 0, 0])


def test_top_p_sees_the_distribution_at_the_set_temperature() -> None:
    # 0.8, 0.2 at temperature 2 is 2/3, 1/3, where the first token no longer reaches 0.7.
    assert distribution([0.8, 0.2], temperature=2.0, top_p=0.7) == pytest.approx([2 / 3, 1 / 3])


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once() -> None:
    log_probs = sampling_distribution(
        torch.tensor([[2.0, -1.0, 2.0, -1.0]]),
        SamplingConfig(repetition_penalty=2.0),
        generated=torch.tensor([[0, 1, 0, 0]]),
        forbidden_ids=NOTHING,
        stop_ids=NOTHING,
    )
    torch.testing.assert_close(log_probs, torch.log_softmax(torch.tensor([[1.0, -2.0, 2.0, -1.0]]), -1))


def test_repetition_penalty_moves_greedy_decoding_off_a_repeated_token() -> None:
    log_probs = sampling_distribution(
        torch.tensor([[2.0, 1.5]]),
        SamplingConfig(repetition_penalty=2.0, temperature=0),
        generated=torch.tensor([[0]]),
        forbidden_ids=NOTHING,
        stop_ids=NOTHING,
    )
    assert log_probs.tolist() == [[IMPOSSIBLE, 0.0]]


def test_stop_tokens_are_excluded_until_the_minimum_is_reached() -> None:
    early = distribution([0.5, 0.3, 0.2], stops=(0,), generated=(1,), min_new_tokens=2)
    assert early == pytest.approx([0, 0.6, 0.4])
    assert distribution([0.5, 0.3, 0.2], stops=(0,), generated=(1, 1), min_new_tokens=2) == pytest.approx(
        [0.5, 0.3, 0.2]
    )


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0}, {"top_k": 1}, {"top_p": 0.1}, {"repetition_penalty": 3.0}],
    ids=["plain", "greedy", "top-k", "top-p", "repetition"],
)
def test_forbidden_tokens_have_no_probability(sampling: dict[str, float]) -> None:
    assert distribution([0.9, 0.06, 0.04], forbidden=(0,), generated=(0,), **sampling)[0] == 0


def test_forbidden_tokens_do_not_count_for_top_k() -> None:
    assert distribution([0.9, 0.05, 0.05], forbidden=(0,), top_k=1) == pytest.approx([0, 1, 0])


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.2])
def test_sampling_probabilities_sum_to_one(temperature: float) -> None:
    logits = torch.randn(16, 300) * 4
    log_probs = sampling_distribution(
        logits,
        SamplingConfig(temperature=temperature, top_k=50, top_p=0.9, repetition_penalty=1.3, min_new_tokens=5),
        generated=torch.randint(300, (16, 3)),
        forbidden_ids=torch.tensor([0, 7]),
        stop_ids=torch.tensor([9]),
    )
    torch.testing.assert_close(log_probs.double().exp().sum(-1), torch.ones(16, dtype=torch.float64), atol=1e-6, rtol=0)


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(4, 10)
    before = logits.clone()
    sampling_distribution(
        logits,
        SamplingConfig(temperature=0.7, top_k=3, top_p=0.8, repetition_penalty=2.0, min_new_tokens=2),
        generated=torch.tensor([[1]] * 4),
        forbidden_ids=torch.tensor([0]),
        stop_ids=torch.tensor([2]),
    )
    assert torch.equal(logits, before)


def test_bfloat16_logits_give_a_float32_distribution() -> None:
    log_probs = sampling_distribution(
        torch.randn(2, 5).bfloat16(),
        SamplingConfig(),
        generated=NOTHING.reshape(2, 0),
        forbidden_ids=NOTHING,
        stop_ids=NOTHING,
    )
    assert log_probs.dtype == torch.float32


def draw(probabilities: list[float], uniforms: list[float]) -> list[int]:
    """Tokens for several uniforms of one distribution."""
    log_probs = torch.tensor([probabilities]).log().expand(len(uniforms), -1)
    return sample(log_probs, torch.tensor(uniforms, dtype=torch.float64)).tolist()


def test_draws_invert_the_cumulative_distribution() -> None:
    assert draw([0.25, 0.5, 0.25], [0.0, 0.24, 0.26, 0.74, 0.76]) == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("uniform", [0.0, 0.5, LARGEST_UNIFORM, 1.0])
def test_tokens_of_probability_zero_are_never_drawn(uniform: float) -> None:
    drawn = draw([0.0, 0.5, 0.0, 0.5, 0.0], [uniform])
    assert drawn in ([1], [3])


def test_a_greedy_distribution_gives_its_token_for_any_uniform() -> None:
    certain = torch.full((3, 6), IMPOSSIBLE)
    certain[:, 4] = 0.0
    assert sample(certain, torch.tensor([0.0, 0.5, LARGEST_UNIFORM], dtype=torch.float64)).tolist() == [4, 4, 4]


def test_the_largest_uniform_gives_the_last_possible_token_of_a_large_vocabulary() -> None:
    log_probs = torch.log_softmax(torch.randn(1, 50_000), -1)
    log_probs[:, -1000:] = IMPOSSIBLE
    drawn = sample(log_probs, torch.tensor([LARGEST_UNIFORM], dtype=torch.float64))
    assert drawn.item() == 50_000 - 1000 - 1


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Pearson's statistic."""
    return float(((counts - expected) ** 2 / expected).sum())


def test_frequencies_of_many_draws_match_the_distribution() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -0.5, 1.5, 0.2])
    draws = 40_000
    log_probs = sampling_distribution(
        logits.expand(draws, -1),
        SamplingConfig(temperature=1.2, top_k=6),
        generated=NOTHING.reshape(1, 0).expand(draws, 0),
        forbidden_ids=torch.tensor([1]),
        stop_ids=NOTHING,
    )
    tokens = sample(log_probs, row_uniforms(torch.arange(draws), 1)[:, 0])
    counts = torch.bincount(tokens, minlength=8).double()
    possible = log_probs[0] > IMPOSSIBLE
    assert int(possible.sum()) == 6
    assert counts[~possible].sum() == 0
    critical_value_5_degrees_p001 = 20.5
    assert chi_square(counts[possible], draws * log_probs[0][possible].double().exp()) < critical_value_5_degrees_p001


def test_steps_of_one_stream_are_as_good_as_streams_of_many_seeds() -> None:
    steps, cells = 40_000, 10
    counts = torch.histc(row_uniforms(torch.tensor([3]), steps)[0].float(), bins=cells, min=0, max=1)
    critical_value_9_degrees_p001 = 27.9
    assert chi_square(counts, torch.full((cells,), steps / cells)) < critical_value_9_degrees_p001


def test_a_row_of_uniforms_depends_on_its_seed_only() -> None:
    together = row_uniforms(torch.tensor([5, 6, 7]), 4)
    reordered = row_uniforms(torch.tensor([7, 5]), 4)
    assert torch.equal(together[[2, 0]], reordered)


def test_more_steps_extend_a_stream() -> None:
    seeds = torch.tensor([11, 12])
    assert torch.equal(row_uniforms(seeds, 50)[:, :7], row_uniforms(seeds, 7))


def test_every_bit_of_a_seed_counts() -> None:
    seeds = torch.tensor([1, 1 + 2**32, 1 - 2**62, -1, 2**63 - 1])
    assert len(set(row_uniforms(seeds, 1)[:, 0].tolist())) == len(seeds)


def test_uniforms_lie_in_the_half_open_unit_interval() -> None:
    uniforms = row_uniforms(torch.arange(100), 100)
    assert uniforms.dtype == torch.float64
    assert bool(((uniforms >= 0) & (uniforms < 1)).all())


def test_token_log_probs_are_of_the_unmodified_distribution() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(9.0), 0.0]])
    torch.testing.assert_close(
        token_log_probs(logits, torch.tensor([1, 1])), torch.tensor([math.log(0.75), math.log(0.1)])
    )
