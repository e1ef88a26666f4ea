"""What the ranks of the TARS test run; apart, because a rank can import this file by its name and no test file."""

from collections.abc import Sequence

import torch.distributed as dist

from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.rewards.judge import JudgeError
from nemo_mapo.rewards.judged import RewardsUnavailable
from nemo_mapo.training.tars import _text_cosines


class Embedder:
    """Texts as points on a circle, by their length; none for those that it has been told to fail."""

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector a text."""
        if self.fails:
            raise JudgeError("the embedding server is gone")
        return [[1.0, float(len(text))] for text in texts]


def cosines_or_reason(failing_rank: int, rank_without_pairs: int) -> list[float] | str:
    """What a rank gets for one pair of texts of equal length, or why it gets none."""
    install_cpu_host()
    initialize_parallel()
    rank = dist.get_rank()
    speech, reference = ([], []) if rank == rank_without_pairs else ([0], [1])
    try:
        cosines = _text_cosines(("heard", "read!"), speech, reference, Embedder(fails=rank == failing_rank))
    except RewardsUnavailable as error:
        return str(error)
    return [float(cosine) for cosine in cosines]
