"""The audio attention mass from explicit S x S weights: the slow, obvious reference for tests and benchmarks only."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nemo_mapo.attention.mass import Blocked


def dense_audio_attention_mass(
    query: Float[Tensor, "batch time_q heads dim"],
    key: Float[Tensor, "batch time_k kv_heads dim"],
    audio_key_mask: Bool[Tensor, "batch time_k"],
    *,
    causal: bool = True,
    segment_ids: Int[Tensor, "batch time_k"] | None = None,
    softmax_scale: float | None = None,
) -> Float[Tensor, "batch heads time_q"]:
    """m_t = sum_{j in audio} alpha_{t,j} from explicit weights; arguments as in `audio_attention_mass`.

    Memory is quadratic in time. float32 at least: narrower inputs are widened first.
    """
    weights = dense_attention_weights(query, key, causal=causal, segment_ids=segment_ids, softmax_scale=softmax_scale)
    return weights.masked_fill(~audio_key_mask[:, None, None, :], 0).sum(-1)


def dense_attention_weights(
    query: Float[Tensor, "batch time_q heads dim"],
    key: Float[Tensor, "batch time_k kv_heads dim"],
    *,
    causal: bool = True,
    segment_ids: Int[Tensor, "batch time_k"] | None = None,
    softmax_scale: float | None = None,
    blocked: Blocked | None = None,
) -> Float[Tensor, "batch heads time_q time_k"]:
    """alpha_{t,j} = softmax_j(scale * q_t . k_j) over the keys query t may see."""
    precision = torch.promote_types(query.dtype, torch.float32)
    shared_by = query.shape[2] // key.shape[2]
    keys = key.to(precision).repeat_interleave(shared_by, dim=2)
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    logits = torch.einsum("bqhd,bkhd->bhqk", query.to(precision), keys) * scale
    visible = _visible_keys(query.shape[1], key.shape[1], causal, segment_ids, query.device)
    if blocked is not None:
        visible = visible & ~(blocked.queries[:, None, :, None] & blocked.keys[:, None, None, :])
    return logits.masked_fill(~visible, -torch.inf).softmax(-1)


def _visible_keys(time_q: int, time_k: int, causal: bool, segment_ids: Tensor | None, device: torch.device) -> Tensor:
    """True where a query may see a key; broadcasts over `[batch, heads, time_q, time_k]`."""
    key_position = torch.arange(time_k, device=device)
    query_position = key_position[time_k - time_q :]
    visible = torch.ones(1, 1, time_q, time_k, dtype=torch.bool, device=device)
    if causal:
        visible = visible & (key_position <= query_position[:, None])
    if segment_ids is not None:
        query_segments = segment_ids[:, time_k - time_q :]
        visible = visible & (query_segments[:, None, :, None] == segment_ids[:, None, None, :])
    return visible
