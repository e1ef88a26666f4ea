"""Late-stage collapse: how much of the early attention to the audio remains at the end of a completion."""

from jaxtyping import Bool, Float
from torch import Tensor

from nemo_mapo.objective.temporal import part_of_token


def collapse_index(mass: Float[Tensor, "batch time"], written: Bool[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    """Collapse index c = 1 - (mean mass of the last third) / (mean mass of the first third).

    0: as much as at first; 1: nothing left; negative: more than at first. Not finite if a third has no tokens or the
    first third no mass.
    """
    third = part_of_token(written, 3)
    early, late = (_mean(mass, written & (third == number)) for number in (0, 2))
    return 1 - late / early


def _mean(values: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    return (values * mask).sum(1) / mask.sum(1)
