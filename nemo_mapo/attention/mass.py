"""Exact audio attention mass at the memory cost of fused attention.

The mass of query t is the attention it spends on audio, m_t = sum_{j in audio} alpha_{t,j} (paper section 3.4).
Attention itself is the linear map alpha @ V, so a value column that is 1 on audio keys and 0 elsewhere comes out
as m_t: the same kernel, the same masks and exact gradients, with no S x S matrix. Segment boundaries and blocked keys
are encoded in extra query and key columns, which keeps the causal kernel and needs no mask tensor.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

HEAD_WIDTH_MULTIPLE = 8
"""Fused kernels need head widths in multiples of 8."""
SEGMENT_SEPARATION = 2.0**16
"""Least logit distance between segments; exp(-2^16) is exactly 0 in every float type, with room for large logits."""
EXPLICIT_MASK_QUERIES = 256
"""Most queries after a key cache that get an explicit mask; the limit keeps a mask linear in time_k."""


class Blocked(NamedTuple):
    """Queries that must not see the given keys: `Blocked(late_tokens, audio_keys)`."""

    queries: Bool[Tensor, "batch time_q"]
    """True on blocked queries; none of them is also a blocked key, so each still sees itself."""
    keys: Bool[Tensor, "batch time_k"]

    def part(self, batch: slice, queries: slice, keys: slice) -> "Blocked":
        """The same for a part of the rows, queries and keys."""
        return Blocked(self.queries[batch, queries], self.keys[batch, keys])


def audio_attention_mass(
    query: Float[Tensor, "batch time_q heads dim"],
    key: Float[Tensor, "batch time_k kv_heads dim"],
    audio_key_mask: Bool[Tensor, "batch time_k"],
    *,
    causal: bool = True,
    segment_ids: Int[Tensor, "batch time_k"] | None = None,
    softmax_scale: float | None = None,
) -> Float[Tensor, "batch heads time_q"]:
    """Attention each query spends on audio keys: m_t = sum_{j in audio} softmax_j(scale * q_t . k_j).

    Differentiable in query and key; memory linear in time. Grouped-query attention when kv_heads < heads.

    - `causal`: the queries are the last time_q of the time_k positions and see no later key.
    - `segment_ids` (>= 0): a key is visible within its own segment only. Id 0 is padding, which no other segment
      sees; padding queries see padding, so every row has a key and no mass is NaN.
    - `softmax_scale`: defaults to dim^-0.5.

    The mass has the query's dtype, except that it is float32 if the query is bfloat16 or float16. There the kernel
    rounds weights and result to the narrow type: expect 2^-7 relative error in bfloat16, and values up to that above 1.

    Raises ValueError for a mask that is not bool, for shapes that do not fit, and for more causal queries than keys.
    """
    mass_only = key[..., :0]
    _, mass = attention_with_audio_mass(
        query,
        key,
        mass_only,
        audio_key_mask,
        causal=causal,
        segment_ids=segment_ids,
        softmax_scale=softmax_scale,
    )
    return mass


def attention_with_audio_mass(
    query: Float[Tensor, "batch time_q heads dim"],
    key: Float[Tensor, "batch time_k kv_heads dim"],
    value: Float[Tensor, "batch time_k kv_heads dim_v"],
    audio_key_mask: Bool[Tensor, "batch time_k"],
    *,
    causal: bool = True,
    segment_ids: Int[Tensor, "batch time_k"] | None = None,
    softmax_scale: float | None = None,
    blocked: Blocked | None = None,
) -> tuple[Float[Tensor, "batch time_q heads dim_v"], Float[Tensor, "batch heads time_q"]]:
    """Attention output and audio mass from one fused call; arguments and errors as in `audio_attention_mass`.

    `blocked` queries attend as if the blocked keys were not there. ValueError if one of them is a blocked key itself.
    """
    if audio_key_mask.dtype != torch.bool:
        raise ValueError(f"audio_key_mask must be bool, got {audio_key_mask.dtype}")
    if audio_key_mask.shape != key.shape[:2]:
        raise ValueError(f"audio_key_mask has shape {tuple(audio_key_mask.shape)}, keys are {tuple(key.shape[:2])}")
    indicator = audio_key_mask[:, :, None, None].to(value.dtype)
    widened = _fused_attention(query, key, value, indicator, causal, segment_ids, softmax_scale, blocked)
    # One split, not two slices: its backward is a single concatenation instead of two zero-filled copies and a sum.
    dim_v = value.shape[-1]
    output, mass, _ = widened.split_with_sizes((dim_v, 1, widened.shape[-1] - dim_v - 1), dim=-1)
    mass = mass.squeeze(-1).transpose(1, 2)
    return output, mass.float() if mass.dtype in (torch.bfloat16, torch.float16) else mass


def attention_without_mass(
    query: Float[Tensor, "batch time_q heads dim"],
    key: Float[Tensor, "batch time_k kv_heads dim"],
    value: Float[Tensor, "batch time_k kv_heads dim_v"],
    *,
    causal: bool = True,
    segment_ids: Int[Tensor, "batch time_k"] | None = None,
    softmax_scale: float | None = None,
    blocked: Blocked | None = None,
) -> Float[Tensor, "batch time_q heads dim_v"]:
    """The same attention with nothing captured; arguments and errors as in `attention_with_audio_mass`."""
    no_indicator = value.new_zeros(1, 1, 1, 0)
    widened = _fused_attention(query, key, value, no_indicator, causal, segment_ids, softmax_scale, blocked)
    return widened[..., : value.shape[-1]]


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    value_channels: Tensor,
    causal: bool,
    segment_ids: Tensor | None,
    softmax_scale: float | None,
    blocked: Blocked | None,
) -> Tensor:
    """Attention over [value | value_channels | zeros], `[batch, time_q, heads, width]`."""
    _check_shapes(query, key, value, segment_ids, causal)
    if blocked is not None:
        _check_blocked(query, key, blocked)
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if query.shape[1] == 1 and segment_ids is not None and value_channels.shape[-1] == 0:
        return _decode_kernel(query, key, value, segment_ids, scale, blocked)
    query_channels = key_channels = query.new_zeros(1, 1, 1, 0)
    if segment_ids is not None:
        query_channels, key_channels = _segment_channels(segment_ids, query.shape[1], scale, query.dtype)
    if blocked is not None:
        query_channels, key_channels = _with_blocked(query_channels, key_channels, blocked, scale)
    width = _common_width(query.shape[-1], key_channels.shape[-1], value.shape[-1], value_channels.shape[-1])
    attended = _causal_kernel(
        _widen(query, query_channels, width).transpose(1, 2),
        _widen(key, key_channels, width).transpose(1, 2),
        _widen(value, value_channels, width).transpose(1, 2),
        causal,
        scale,
    )
    return attended.transpose(1, 2)


def _decode_kernel(
    query: Tensor, key: Tensor, value: Tensor, segment_ids: Tensor, scale: float, blocked: Blocked | None
) -> Tensor:
    """One token per row against a cache: the mask is a single line here, cheaper than widening the whole cache.

    Heads that share keys become queries of one head, because the kernel's own grouped attention would copy the cache
    for each of them.
    """
    visible = (segment_ids == segment_ids[:, -1:])[:, None, None]
    if blocked is not None:
        visible = visible & ~(blocked.queries[:, :, None] & blocked.keys[:, None])[:, None]
    batch, _, heads, dim = query.shape
    attended = F.scaled_dot_product_attention(
        query.reshape(batch, key.shape[2], heads // key.shape[2], dim),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=visible,
        scale=scale,
    )
    return attended.reshape(batch, 1, heads, value.shape[-1])


def _causal_kernel(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Tensor:
    """Scaled dot-product attention on `[batch, heads, time, width]`, queries aligned with the last keys."""
    time_q, time_k = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    aligned = causal and time_q == time_k
    if aligned or not causal or time_q == 1:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=aligned and time_q > 1, scale=scale, enable_gqa=grouped
        )
    earlier = time_k - time_q
    if time_q <= EXPLICIT_MASK_QUERIES:
        visible = torch.ones(time_q, time_k, dtype=torch.bool, device=query.device).tril(earlier)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale, enable_gqa=grouped)
    # The kernel aligns `is_causal` with the first key: padding queries for the earlier keys move ours into place.
    query = F.pad(query, (0, 0, earlier, 0))
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return attended[:, :, earlier:]


def _segment_channels(segment_ids: Tensor, time_q: int, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Query and key columns whose product is exactly 0 within a segment and hugely negative across segments.

    An id is written as its bits b and their complements, c = [b, 1 - b]. Queries carry r c and keys -r (1 - c), so
    each differing bit adds -r^2 to the product and each equal bit adds a true zero: logits within a segment keep every
    digit, logits across segments fall by at least r^2 * scale >= SEGMENT_SEPARATION.
    """
    lowest, highest = (int(bound) for bound in segment_ids.aminmax())
    if lowest < 0:
        raise ValueError(f"segment_ids must be >= 0, got {lowest}")
    if lowest == highest:
        nothing = torch.zeros(1, 1, 1, 0, dtype=dtype, device=segment_ids.device)
        return nothing, nothing
    shifts = torch.arange(highest.bit_length(), device=segment_ids.device)
    bits = segment_ids.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(1).bool()
    code = torch.cat((bits, ~bits), dim=-1).unsqueeze(2)
    root = _root_of_separation(scale)
    time_k = code.shape[1]
    return code[:, time_k - time_q :].to(dtype) * root, code.logical_not().to(dtype) * -root


def _with_blocked(query: Tensor, key: Tensor, blocked: Blocked, scale: float) -> tuple[Tensor, Tensor]:
    """Append a channel whose product is hugely negative on blocked pairs and exactly 0 on all others.

    Logits of a blocked query against other keys keep every digit, so it attends as if the blocked keys did not exist.
    """
    root = _root_of_separation(scale)
    marks = (blocked.queries.to(query.dtype) * root, blocked.keys.to(key.dtype) * -root)
    channels = []
    for there, mark in zip((query, key), marks, strict=True):
        mark = mark[:, :, None, None]
        channels.append(torch.cat((there.expand(*mark.shape[:3], there.shape[-1]), mark), dim=-1))
    return channels[0], channels[1]


def _root_of_separation(scale: float) -> float:
    """A power of two, exact in every float type; query and key each carry the root, which fits float16 as well."""
    return float(2.0 ** math.ceil(math.log2(SEGMENT_SEPARATION / scale) / 2))


def _common_width(dim: int, key_channels: int, dim_v: int, value_channels: int) -> int:
    """Head width that holds keys and values with their channels: unequal widths would miss the fused CPU kernel."""
    width = max(dim + key_channels, dim_v + value_channels)
    if key_channels or value_channels:
        width = math.ceil(width / HEAD_WIDTH_MULTIPLE) * HEAD_WIDTH_MULTIPLE
    return width


def _widen(tensor: Tensor, channels: Tensor, width: int) -> Tensor:
    """`[tensor | channels | zeros]` along the last dimension, `channels` shared by all heads."""
    missing = width - tensor.shape[-1]
    if missing == 0:
        return tensor
    block = F.pad(channels, (0, missing - channels.shape[-1]))
    return torch.cat((tensor, block.expand(*tensor.shape[:-1], missing)), dim=-1)


def _check_blocked(query: Tensor, key: Tensor, blocked: Blocked) -> None:
    shapes = (tuple(blocked.queries.shape), tuple(blocked.keys.shape))
    if shapes != (tuple(query.shape[:2]), tuple(key.shape[:2])):
        raise ValueError(
            f"blocked has queries {shapes[0]} and keys {shapes[1]}; queries are {tuple(query.shape[:2])}, keys "
            f"{tuple(key.shape[:2])}"
        )
    if bool((blocked.queries & blocked.keys[:, key.shape[1] - query.shape[1] :]).any()):
        raise ValueError("a blocked query is a blocked key itself and might see no key at all; leave it out of queries")


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, segment_ids: Tensor | None, causal: bool) -> None:
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"{query.shape[2]} query heads cannot share {key.shape[2]} key heads evenly")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit together"
        )
    if query.shape[1] > key.shape[1] and (causal or segment_ids is not None):
        raise ValueError(f"{query.shape[1]} queries for {key.shape[1]} keys: queries are the last key positions")
    if segment_ids is None:
        return
    if segment_ids.shape != key.shape[:2]:
        raise ValueError(f"segment_ids have shape {tuple(segment_ids.shape)}, keys are {tuple(key.shape[:2])}")
    if segment_ids.dtype == torch.bool or segment_ids.is_floating_point():
        raise ValueError(f"segment_ids must be integers, got {segment_ids.dtype}")
