"""Which weights are trained: low-rank adapters and frozen parts."""

from typing import Annotated, Literal

from pydantic import Field

from nemo_mapo.config.base import config_class
from nemo_mapo.config.fields import Count, Flag, Positive

LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


@config_class
class LoraConfig:
    """Low-rank adapters on projections of every decoder layer, W x + alpha / rank * B A x; the decoder is frozen."""

    rank: Count = 16
    """Rows of A and columns of B."""
    alpha: Positive = 32.0
    """The update B A is weighted by alpha / rank."""
    targets: Annotated[tuple[LoraTarget, ...], Field(min_length=1)] = (
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    )
    """Projections with an adapter, in NeMo's names: attention in and out, feed-forward in and out."""

    def __post_init__(self) -> None:
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets={list(self.targets)} names a projection twice")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@config_class
class FreezeConfig:
    """Parts that are not trained; null means true with LoRA and false without."""

    perception: Flag | None = None
    """The audio encoder, without its projector. If it is trained along with adapters, the reference keeps a copy."""
    projector: Flag | None = None
    """The layers that map the encoder's frames to the decoder's width: `projection` of the convolutional encoder,
    modality adapter and `proj` of NeMo's."""
    decoder: Flag = False
    """The decoder's own weights, including embeddings and norms; adapters are still trained."""
