"""The projector between an encoder and a decoder that were not trained together."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nemo_mapo.config.model import ProjectorConfig


class Projector(nn.Module):
    """Stacks neighbouring frames of a clip and maps them to the decoder's width, each clip on its own."""

    def __init__(self, config: ProjectorConfig, frame_size: int, hidden_size: int) -> None:
        super().__init__()
        self.stack = config.stack
        inner = frame_size * config.stack
        layers: list[nn.Module] = [nn.Linear(inner, hidden_size)]
        if config.type == "mlp":
            layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
        self.layers = nn.Sequential(*layers)

    def num_tokens(self, num_frames: int) -> int:
        """Audio tokens of a clip with this many frames of the encoder."""
        return -(-num_frames // self.stack)

    def forward(self, clips: list[Float[Tensor, "_ frame"]]) -> list[Float[Tensor, "_ hidden"]]:
        """Audio tokens of each clip."""
        stacked = [F.pad(frames, (0, 0, 0, -len(frames) % self.stack)).reshape(-1, self._width) for frames in clips]
        projected: Tensor = self.layers(torch.cat(stacked))
        return list(torch.split(projected, [len(frames) for frames in stacked]))

    @property
    def _width(self) -> int:
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        return first.in_features
