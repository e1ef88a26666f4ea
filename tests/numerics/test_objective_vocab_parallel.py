"""Log-probability and entropy over a vocabulary split between two gloo ranks, against one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_mapo.objective.divergence import divergence
from nemo_mapo.objective.logprobs import log_probs_and_entropy

BATCH, TIME, VOCAB = 3, 5, 12
# Uneven on purpose: an offset that assumes equal shards is wrong here.
SHARDS = ((0, 7), (7, 12))
CHUNK_SIZE = 4
TIMEOUT_SECONDS = 60


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with a shard of -inf in one position and no finite logit in another, targets, upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(BATCH, TIME, VOCAB, generator=generator, dtype=torch.float64)
    logits[0, 0, 7:] = -torch.inf
    logits[0, 1, :7] = -torch.inf
    logits[1, 2] = -torch.inf
    targets = torch.randint(0, VOCAB, (BATCH, TIME), generator=generator)
    targets[0, 0], targets[0, 1] = 3, 9
    return logits.to(dtype), targets, torch.randn(BATCH, TIME, generator=generator, dtype=torch.float64)


def run(logits: Tensor, targets: Tensor, upstream: Tensor, **shard: object) -> dict[str, Tensor]:
    leaf = logits.clone().requires_grad_()
    log_probs, entropy_nats = log_probs_and_entropy(leaf, targets, chunk_size=CHUNK_SIZE, **shard)  # type: ignore[arg-type]
    # The entropy is in the loss too, where it must add nothing to the gradient.
    (log_probs * upstream + entropy_nats).sum().backward()
    assert leaf.grad is not None
    return {"log_probs": log_probs.detach(), "entropy_nats": entropy_nats, "grad": leaf.grad}


def pair() -> tuple[Tensor, Tensor]:
    """Logits with and without the audio; padding columns, and a whole shard of probability 0."""
    generator = torch.Generator().manual_seed(1)
    heard, unheard = (4 * torch.randn(BATCH, TIME, VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    heard[..., -1] = unheard[..., -1] = -torch.inf
    heard[0, 0, :7] = -torch.inf
    return heard, unheard


def divergences(heard: Tensor, unheard: Tensor, **shard: object) -> dict[str, Tensor]:
    kinds = ("kl", "jsd")
    return {kind: divergence(heard, unheard, kind=kind, chunk_size=CHUNK_SIZE, **shard) for kind in kinds}  # type: ignore[arg-type]


def work(rank: int, folder: str) -> None:
    """One rank: compute on its shard in every dtype, leave the results in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SHARDS))
    start, end = SHARDS[rank]
    results = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits, targets, upstream = case(dtype)
        shard = {"process_group": dist.group.WORLD, "vocab_start": start}
        results[dtype] = run(logits[..., start:end], targets, upstream, **shard)
    targets[2, 4] = VOCAB
    results["beyond"] = run(logits[..., start:end], targets, upstream, **shard)
    results["divergence"] = divergences(*(logits[..., start:end] for logits in pair()), process_group=dist.group.WORLD)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[dict[object, dict[str, Tensor]]]:
    """Results of both ranks, each a run of this file: a spawned child could not import a test module by its name."""
    folder = tmp_path_factory.mktemp("vocab_parallel")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment)
        for rank in range(len(SHARDS))
    ]
    try:
        assert [rank.wait(timeout=TIMEOUT_SECONDS) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(SHARDS))]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)]
)
def test_two_shards_equal_one_process(
    shards: list[dict[object, dict[str, Tensor]]], dtype: torch.dtype, tolerance: float
) -> None:
    whole = run(*case(dtype))
    for rank in range(len(SHARDS)):
        for name in ("log_probs", "entropy_nats"):
            torch.testing.assert_close(shards[rank][dtype][name], whole[name], rtol=tolerance, atol=tolerance)
    grad = torch.cat([shards[rank][dtype]["grad"] for rank in range(len(SHARDS))], dim=-1)
    # A bfloat16 gradient may round to either neighbour.
    rounding = 2**-7 if dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(grad, whole["grad"], rtol=rounding, atol=tolerance)
    assert whole["log_probs"][1, 2] == -torch.inf
    assert whole["entropy_nats"].isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.distributed
def test_divergences_of_two_shards_equal_those_of_one_process(shards: list[dict[object, dict[str, Tensor]]]) -> None:
    for kind, whole in divergences(*pair()).items():
        for rank in range(len(SHARDS)):
            torch.testing.assert_close(shards[rank]["divergence"][kind], whole, rtol=1e-12, atol=1e-12)


@pytest.mark.distributed
def test_a_shard_gets_the_dense_gradient_of_targets_that_the_other_shard_holds(
    shards: list[dict[object, dict[str, Tensor]]],
) -> None:
    logits, targets, upstream = case(torch.float64)
    leaf = logits.clone().requires_grad_()
    dense = leaf.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    possible = logits.isfinite().any(-1)
    (dense * upstream)[possible].sum().backward()
    assert leaf.grad is not None
    for rank, (start, end) in enumerate(SHARDS):
        elsewhere = possible & ~((targets >= start) & (targets < end))
        assert elsewhere.any()
        expected = leaf.grad[..., start:end][elsewhere]
        assert (expected != 0).any()
        torch.testing.assert_close(shards[rank][torch.float64]["grad"][elsewhere], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.distributed
def test_a_target_that_no_shard_holds_is_nan(shards: list[dict[object, dict[str, Tensor]]]) -> None:
    for shard in shards:
        is_nan = shard["beyond"]["log_probs"].isnan()
        assert is_nan[2, 4]
        assert is_nan.sum() == 1


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
