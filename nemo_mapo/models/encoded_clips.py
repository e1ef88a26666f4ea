"""Cache for the output of a frozen encoder, because every pass and every epoch encodes the same clips."""

from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

_LIMIT: Final = 256 * 2**20
"""Bytes of host memory; an hour of speech at 50 positions per second of 384 float32 values."""


class EncodedClips:
    """Encodings keyed by the samples of a clip, in host memory; the least recently used clip is evicted first.

    A clip is encoded alone, so that its encoding depends neither on the batch nor on what is cached: a resumed run,
    whose cache is empty, computes the same bits. Loading weights or changing them in place empties the cache.

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
        """Whether the encoder is not trained at all, so that its encodings can be cached."""
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
        # A copy, because a view would keep the dropped frames of the padding in memory.
        self._kept[key] = made.cpu().clone()
        self._bytes += made.nbytes
        while self._bytes > self._limit:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.nbytes
        return made
