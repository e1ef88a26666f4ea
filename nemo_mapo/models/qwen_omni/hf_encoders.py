"""transformers' two Qwen audio encoders with attention inside their windows only; imported where one is built."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniAudioEncoderConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeAudioEncoderConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeAudioEncoder,
    _get_feat_extract_output_lengths,
)

from nemo_mapo.config.model import QwenOmniPerceptionConfig

_ATTENTION = "nemo_mapo_windows"
_QWEN3_CHUNK_FRAMES = 100
"""Feature frames of a chunk, as transformers assumes when it counts Qwen3's tokens."""


def windowed_attention(
    module: nn.Module,
    query: Float[Tensor, "one heads positions width"],
    key: Float[Tensor, "one heads positions width"],
    value: Float[Tensor, "one heads positions width"],
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Int[Tensor, " bounds"] | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "one positions heads width"], None]:
    """What flash attention does with `cu_seq_lens`: full attention within each window, none across; no S x S mask.

    transformers 4 calls it once with the bounds of all windows, transformers 5 once per window without any.
    """
    assert attention_mask is None, "the windows are the mask"
    if cu_seq_lens_q is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None
    lengths = cu_seq_lens_q.diff()
    valid = torch.arange(int(lengths.max()), device=query.device) < lengths[:, None]

    def by_window(tensor: Tensor) -> Tensor:
        windows = tensor.new_zeros(*valid.shape, *tensor.shape[1::2])
        windows[valid] = tensor[0].transpose(0, 1)
        return windows.transpose(1, 2)

    attended = F.scaled_dot_product_attention(
        by_window(query), by_window(key), by_window(value), attn_mask=valid[:, None, None], scale=scaling
    )
    return attended.transpose(1, 2)[valid][None], None


AttentionInterface.register(_ATTENTION, windowed_attention)


class Qwen25Encoder(Qwen2_5OmniAudioEncoder):  # type: ignore[no-untyped-call]
    """Upstream's encoder without its mask over all positions of a batch, which grows with the square of their number.

    The embeddings of the start and end of audio are carried along; the thinker does not use them.
    """

    def __init__(self, config: Qwen2_5OmniAudioEncoderConfig) -> None:
        super().__init__(config)
        self.audio_bos_eos_token.weight.requires_grad_(False)

    def _prepare_attention_mask(  # type: ignore[override]
        self, inputs_tensor: Tensor, cu_seqlens: Tensor
    ) -> None:
        return None


class Qwen3Encoder(Qwen3OmniMoeAudioEncoder):  # type: ignore[no-untyped-call]
    """Upstream's encoder; it counts positions after its convolutions itself."""

    def forward(self, input_features: Tensor, feature_lens: Tensor, aftercnn_lens: Tensor | None = None) -> Any:
        """Encode the joined features of several clips."""
        return super().forward(input_features, feature_lens=feature_lens)


def build_encoder(config: QwenOmniPerceptionConfig) -> Qwen25Encoder | Qwen3Encoder:
    """Build the encoder of the config's family with random weights."""
    if config.family == "qwen2_5_omni":
        config_2_5 = Qwen2_5OmniAudioEncoderConfig(**config.encoder)  # type: ignore[no-untyped-call]
        config_2_5._attn_implementation = _ATTENTION
        return Qwen25Encoder(config_2_5)
    audio_config = Qwen3OmniMoeAudioEncoderConfig(**config.encoder)  # type: ignore[no-untyped-call]
    if 2 * audio_config.n_window != _QWEN3_CHUNK_FRAMES:
        raise ValueError(
            f"model.perception.encoder.n_window={audio_config.n_window}: transformers counts audio tokens for chunks "
            f"of {_QWEN3_CHUNK_FRAMES} frames; it must be {_QWEN3_CHUNK_FRAMES // 2}"
        )
    audio_config._attn_implementation = _ATTENTION
    return Qwen3Encoder(audio_config)


def tokens_of_frames(family: str, frames: int) -> int:
    """Audio tokens of a clip with this many feature frames."""
    if family == "qwen3_omni_moe":
        return int(_get_feat_extract_output_lengths(frames))  # type: ignore[no-untyped-call]
    return ((frames - 1) // 2 + 1) // 2
