"""What a frozen encoder made of clips, kept, because every pass and every epoch asks for the same."""

from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

_LIMIT: Final = 256 * 2**20
"""Bytes of host memory; an hour of speech at 50 positions a second of 384 float32 values."""


class EncodedClips:
    """Encodings by the samples of a clip, in host memory; the clip that was not asked for longest goes first.

    A clip is encoded alone, so that its encoding depends neither on the batch nor on what is kept: a resumed run, which
    begins with nothing, computes the same bits. Weights that were loaded or changed in place are noticed.

        clips = EncodedClips(whisper.encoder)
        clips.encoded(waveform, encode)  # calls `encode` the first time only
    """

    def __init__(self, encoder: nn.Module, limit: int = _LIMIT) -> None:
        self._parameters = list(encoder.parameters())
        self._limit = limit
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0
        self._weights: tuple[object, ...] = ()

    @property
    def frozen(self) -> bool:
        """Whether the encoder learns nothing, so that its encodings can be kept."""
        return not any(parameter.requires_grad for parameter in self._parameters)

    def encoded(
        self, waveform: Float[Tensor, " samples"], encode: Callable[[Tensor], Float[Tensor, "frames width"]]
    ) -> Float[Tensor, "frames width"]:
        """The encoding of one clip, on the clip's device and without a gradient."""
        weights = tuple((id(one), one.data_ptr(), one._version) for one in self._parameters)
        if weights != self._weights:
            self._weights, self._bytes = weights, 0
            self._kept.clear()
        key = blake2b(waveform.detach().float().cpu().numpy().tobytes(), digest_size=16).digest()
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
            return found.to(waveform.device)
        with torch.no_grad():
            made = encode(waveform)
        # A copy, or the frames of the padding that were cut off would be kept with it.
        self._kept[key] = made.cpu().clone()
        self._bytes += made.nbytes
        while self._bytes > self._limit:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.nbytes
        return made
