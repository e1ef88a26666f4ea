import math

import pytest
import torch

from benchmarks.logprob_entropy import PER_TOKEN_BYTES, chunked, extra_bytes, make_case
from nemo_mapo.objective.logprobs import log_probs_and_entropy


def test_three_way_distribution_by_hand() -> None:
    # Logits ln 1, ln 2, ln 5 are the probabilities 1/8, 2/8, 5/8.
    logits = torch.tensor([[[0.0, math.log(2), math.log(5)]]], dtype=torch.float64)
    log_probs, entropy_nats = log_probs_and_entropy(logits, torch.tensor([[1]]), chunk_size=1)
    assert log_probs.item() == pytest.approx(-1.3862943611198906, rel=1e-14)  # ln(1/4)
    by_hand = -(0.125 * math.log(0.125) + 0.25 * math.log(0.25) + 0.625 * math.log(0.625))
    assert entropy_nats.item() == pytest.approx(by_hand, rel=1e-14)


def test_gradient_is_one_hot_minus_softmax() -> None:
    logits = torch.tensor([[[0.0, math.log(2), math.log(5)]]], dtype=torch.float64, requires_grad=True)
    log_probs, _ = log_probs_and_entropy(logits, torch.tensor([[1]]), chunk_size=1)
    (3.0 * log_probs.sum()).backward()
    expected = torch.tensor([[[-3 / 8, 3 * 6 / 8, -3 * 5 / 8]]], dtype=torch.float64)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-14, atol=0)


def test_entropy_carries_no_gradient() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    log_probs, entropy_nats = log_probs_and_entropy(logits, torch.zeros(2, 3, dtype=torch.long), chunk_size=2)
    assert log_probs.requires_grad
    assert not entropy_nats.requires_grad
    assert entropy_nats.grad_fn is None


def test_an_entropy_in_the_loss_leaves_the_gradient_as_it_is() -> None:
    logits, targets = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    grads = []
    for entropy_weight in (0.0, 7.0):
        leaf = logits.clone().requires_grad_()
        log_probs, entropy_nats = log_probs_and_entropy(leaf, targets, chunk_size=2)
        (log_probs + entropy_weight * entropy_nats).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 7, 100])
def test_chunk_size_changes_neither_value_nor_gradient(chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 11, generator=generator)
    targets = torch.randint(0, 11, (3, 5), generator=generator)
    weights = torch.randn(3, 5, generator=generator)
    results = []
    for size in (chunk_size, 15):
        leaf = logits.clone().requires_grad_()
        log_probs, entropy_nats = log_probs_and_entropy(leaf, targets, chunk_size=size)
        (weights * log_probs).sum().backward()
        results.append((log_probs.detach(), entropy_nats, leaf.grad))
    for part, whole in zip(*results, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-6, atol=1e-6)


def test_layout_of_megatron_gives_the_same_as_a_contiguous_copy() -> None:
    time_major = torch.randn(6, 4, 9, dtype=torch.float64)
    logits = time_major.transpose(0, 1)[:, 1:5]
    targets = torch.randint(0, 9, (4, 4))
    strided = log_probs_and_entropy(logits, targets, chunk_size=3)
    copied = log_probs_and_entropy(logits.contiguous(), targets, chunk_size=3)
    torch.testing.assert_close(strided, copied, rtol=1e-14, atol=1e-14)


def test_a_constant_added_to_the_logits_changes_nothing() -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.float64)
    targets = torch.randint(0, 7, (2, 3))
    plain = log_probs_and_entropy(logits, targets, chunk_size=4)
    shifted = log_probs_and_entropy(logits + 500.0, targets, chunk_size=4)
    torch.testing.assert_close(shifted, plain, rtol=1e-10, atol=1e-10)


def test_masked_vocabulary_entries_have_probability_zero() -> None:
    finite = torch.tensor([[[0.3, -1.0, 2.0]]], dtype=torch.float64)
    masked = torch.full((1, 1, 5), -torch.inf, dtype=torch.float64)
    masked[..., [0, 2, 3]] = finite
    leaf = masked.clone().requires_grad_()
    log_probs, entropy_nats = log_probs_and_entropy(leaf, torch.tensor([[2]]), chunk_size=1)
    expected = log_probs_and_entropy(finite, torch.tensor([[1]]), chunk_size=1)
    torch.testing.assert_close((log_probs.detach(), entropy_nats), expected, rtol=1e-14, atol=0)
    log_probs.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[..., [1, 4]], torch.zeros(1, 1, 2, dtype=torch.float64))
    assert torch.isfinite(leaf.grad).all()


def test_masked_target_is_impossible_but_the_entropy_stands() -> None:
    logits = torch.tensor([[[0.0, -torch.inf, 0.0]]])
    log_probs, entropy_nats = log_probs_and_entropy(logits, torch.tensor([[1]]), chunk_size=1)
    assert log_probs.item() == -torch.inf
    assert entropy_nats.item() == pytest.approx(math.log(2), rel=1e-6)


def test_a_difference_of_logits_that_overflows_is_probability_zero() -> None:
    logits = torch.tensor([[[3e38, -3e38, 3e38]]], requires_grad=True)
    log_probs, entropy_nats = log_probs_and_entropy(logits, torch.tensor([[2]]), chunk_size=1)
    assert log_probs.item() == pytest.approx(-math.log(2), rel=1e-6)
    assert entropy_nats.item() == pytest.approx(math.log(2), rel=1e-6)
    log_probs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[[-0.5, 0.0, 0.5]]]


def test_no_finite_logit_gives_impossible_target_zero_entropy_and_zero_gradient() -> None:
    logits = torch.full((1, 2, 4), -torch.inf)
    logits[0, 1] = 0.0
    logits.requires_grad_()
    log_probs, entropy_nats = log_probs_and_entropy(logits, torch.zeros(1, 2, dtype=torch.long), chunk_size=2)
    assert log_probs[0, 0].item() == -torch.inf
    assert entropy_nats[0].tolist() == pytest.approx([0.0, math.log(4)])
    log_probs.sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad[0, 0], torch.zeros(4))
    assert torch.equal(logits.grad[0, 1], torch.tensor([0.75, -0.25, -0.25, -0.25]))


def test_nan_logits_are_not_hidden() -> None:
    logits = torch.zeros(1, 2, 3)
    logits[0, 0, 2] = torch.nan
    log_probs, entropy_nats = log_probs_and_entropy(logits, torch.zeros(1, 2, dtype=torch.long), chunk_size=2)
    assert log_probs.isnan().tolist() == [[True, False]]
    assert entropy_nats.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("dtype", "result_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 2e-6),
        (torch.bfloat16, torch.float32, 2e-6),
    ],
)
def test_precision_is_that_of_the_accumulation_not_of_the_logits(
    dtype: torch.dtype, result_dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(2, 4, 1000, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, 1000, (2, 4), generator=generator)
    log_probs, entropy_nats = log_probs_and_entropy(logits, targets, chunk_size=3)
    assert log_probs.dtype == entropy_nats.dtype == result_dtype
    exact = torch.log_softmax(logits.double(), -1)
    exact_log_probs = exact.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(log_probs.double(), exact_log_probs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(entropy_nats.double(), -(exact.exp() * exact).sum(-1), rtol=tolerance, atol=tolerance)


def test_gradient_of_bfloat16_logits_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1, 3, 50, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(0, 50, (1, 3), generator=generator)
    log_probs, _ = log_probs_and_entropy(logits, targets, chunk_size=2)
    log_probs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    exact = torch.nn.functional.one_hot(targets, 50) - torch.softmax(logits.detach().double(), -1)
    torch.testing.assert_close(logits.grad.double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("chunk_size", [2, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_beside_the_gradient_both_passes_take_no_more_memory_than_one_chunk(
    dtype: str, chunk_size: int, time_major: bool
) -> None:
    logits, targets = make_case(tokens := 32, vocab := 4096, dtype)
    if time_major:
        logits, targets = logits.view(8, 4, vocab).transpose(0, 1), targets.view(8, 4).transpose(0, 1)
    logits = logits.detach().requires_grad_()
    chunk = chunk_size * vocab * torch.float32.itemsize
    extra = extra_bytes(chunked, logits, targets, chunk_size)
    assert chunk <= extra <= chunk + tokens * PER_TOKEN_BYTES < 2 * chunk


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_batches_and_times_pass(shape: tuple[int, int]) -> None:
    log_probs, entropy_nats = log_probs_and_entropy(
        torch.zeros(*shape, 4), torch.zeros(shape, dtype=torch.long), chunk_size=2
    )
    assert log_probs.shape == entropy_nats.shape == shape


def test_bad_arguments_are_refused() -> None:
    logits, targets = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="chunk_size=0"):
        log_probs_and_entropy(logits, targets, chunk_size=0)
    with pytest.raises(ValueError, match="vocab_start=4 needs the process group"):
        log_probs_and_entropy(logits, targets, chunk_size=1, vocab_start=4)
    with pytest.raises(RuntimeError, match="out of bounds"):
        log_probs_and_entropy(logits, targets + 4, chunk_size=1)
