"""Late-stage collapse: how much of the early attention to the audio remains at the end of a completion."""

import torch
from jaxtyping import Float
from torch import Tensor

from nemo_mapo.objective.temporal import part_of_token


def collapse_index(mass: Float[Tensor, " time"]) -> float:
    """Collapse index c = 1 - (mean mass of the last third) / (mean mass of the first third) of one completion.

    0: as much as at first; 1: nothing left; negative: more than at first. Not finite if a third has no tokens or the
    first third no mass.
    """
    third = part_of_token(torch.ones_like(mass, dtype=torch.bool), 3)
    return float(1 - mass[third == 2].mean() / mass[third == 0].mean())
