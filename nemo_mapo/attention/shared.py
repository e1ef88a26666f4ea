"""Causal attention over a row in which several completions share one prompt.

Every completion reads the prompt and itself, never its neighbours. The prompt's keys and values are computed once; the
completions of a group attend side by side, each to [prompt keys | own keys], so nothing is computed and thrown away.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemo_mapo.attention.mass import (
    EXPLICIT_MASK_QUERIES,
    Blocked,
    attention_with_audio_mass,
    attention_without_mass,
)


@dataclass(frozen=True, kw_only=True)
class SharedPrompt:
    """Location of a prompt and its completions in a row."""

    start: int
    """First token of the prompt."""
    prompt: int
    """Tokens of the prompt; 0 for a single sequence, which shares nothing."""
    completions: tuple[int, ...]
    """Tokens of each completion; the completions follow the prompt one after the other."""

    @property
    def end(self) -> int:
        """One past the last token of the group."""
        return self.start + self.prompt + sum(self.completions)


def shared_prompts(positions: Int[Tensor, " time"]) -> list[SharedPrompt]:
    """Recover the groups of a row from the positions of its tokens.

    Positions count from 0 at each prompt and go back to the same value, the prompt's length, where each further
    completion begins: `0 1 2 3 | 2 3 4 | 2` are three completions of 2, 3 and 1 tokens after a prompt of 2.

        shared_prompts(torch.tensor([0, 1, 2, 3, 2, 3, 4, 2]))
        # [SharedPrompt(start=0, prompt=2, completions=(2, 3, 1))]

    Raises:
        ValueError: the row does not begin with position 0, or completions of a group begin at different positions.
    """
    if len(positions) == 0 or positions[0] != 0:
        raise ValueError("a row of shared prompts must begin with position 0")
    # Every layer calls this, so only the few positions at which a run begins are moved off the device.
    jumps = (positions[1:] != positions[:-1] + 1).nonzero().flatten() + 1
    begins = torch.cat([jumps.new_zeros(1), jumps])
    groups: list[list[_Run]] = []
    bounds = [*begins.tolist(), len(positions)]
    for (begin, end), position in zip(pairwise(bounds), positions[begins].tolist(), strict=True):
        if position == 0:
            groups.append([])
        groups[-1].append(_Run(begin=begin, end=end, position=position))
    return [_group(runs) for runs in groups]


class _Run(NamedTuple):
    """Tokens at consecutive positions."""

    begin: int
    end: int
    position: int
    """Of the first token."""


def _group(runs: list[_Run]) -> SharedPrompt:
    first, further = runs[0], runs[1:]
    length = first.end - first.begin
    if not further:
        return SharedPrompt(start=first.begin, prompt=0, completions=(length,))
    prompt = further[0].position
    if any(run.position != prompt for run in further) or not 0 < prompt < length:
        raise ValueError(
            f"the completions of the prompt at {first.begin} begin at positions {[run.position for run in further]}; "
            "all must begin where the prompt ends"
        )
    lengths = (length - prompt, *(run.end - run.begin for run in further))
    return SharedPrompt(start=first.begin, prompt=prompt, completions=lengths)


def shared_prompt_attention(
    query: Float[Tensor, "time heads dim"],
    key: Float[Tensor, "time kv_heads dim"],
    value: Float[Tensor, "time kv_heads dim_v"],
    positions: Int[Tensor, " time"],
    *,
    audio_key_mask: Bool[Tensor, " time"] | None = None,
    softmax_scale: float | None = None,
    blocked: Blocked | None = None,
) -> tuple[Float[Tensor, "time heads dim_v"], Float[Tensor, "heads time"] | None]:
    """Attention output, and the audio mass of the completions if `audio_key_mask` is given.

    Equal in value and gradient to causal attention on each [prompt | completion] separately; gradients of a prompt add
    up over its completions. The mass of prompt tokens is not computed and is returned as 0.

    Args:
        query: queries of the whole row; keys and values likewise, with grouped-query attention if kv_heads < heads.
        key: keys, rotated to `positions`.
        value: values.
        positions: position of each token in its own sequence (`shared_prompts`).
        audio_key_mask: True on the keys whose mass is measured.
        softmax_scale: dim^-0.5 if None.
        blocked: tokens of the row that must not see some of its keys.

    Raises:
        ValueError: from `shared_prompts`, for positions that describe no groups.
    """
    outputs, masses = [], []
    for group in shared_prompts(positions):
        end_of_prompt = group.start + group.prompt
        prompt, own = slice(group.start, end_of_prompt), slice(end_of_prompt, group.end)
        if group.prompt:
            of_prompt = None if blocked is None else blocked.part(slice(None), prompt, prompt)
            rows = (query[None, prompt], key[None, prompt], value[None, prompt])
            outputs.append(attention_without_mass(*rows, softmax_scale=softmax_scale, blocked=of_prompt)[0])
        queries = _side_by_side(query[own], group.completions)
        keys = _after_prompt(key[prompt], key[own], group.completions)
        values = _after_prompt(value[prompt], value[own], group.completions)
        valid = _valid(group.completions, query.device)
        audio = None
        if audio_key_mask is not None:
            audio = _after_prompt(audio_key_mask[prompt], audio_key_mask[own], group.completions)
        of_own = None
        if blocked is not None:
            deaf = _side_by_side(blocked.queries[0, own], group.completions)
            of_own = Blocked(deaf, _after_prompt(blocked.keys[0, prompt], blocked.keys[0, own], group.completions))
        output, mass = _attend_in_blocks(queries, keys, values, audio, softmax_scale, of_own)
        outputs.append(output[valid])
        if mass is not None:
            masses += [mass.new_zeros(mass.shape[1], group.prompt), mass.transpose(1, 2)[valid].T]
    return torch.cat(outputs), torch.cat(masses, dim=1) if masses else None


def _attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    audio: Tensor | None,
    softmax_scale: float | None,
    blocked: Blocked | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of the last positions to themselves and all earlier ones, in blocks of queries whose mask is cheap.

    A block sees no key after its last query, so half of the square that a mask would hide is never computed.
    """
    time, earlier = query.shape[1], key.shape[1] - query.shape[1]
    outputs, masses = [], []
    for begin in range(0, time, EXPLICIT_MASK_QUERIES):
        end = min(begin + EXPLICIT_MASK_QUERIES, time)
        block = (query[:, begin:end], key[:, : earlier + end], value[:, : earlier + end])
        hidden = None
        if blocked is not None:
            hidden = blocked.part(slice(None), slice(begin, end), slice(earlier + end))
        if audio is None:
            outputs.append(attention_without_mass(*block, softmax_scale=softmax_scale, blocked=hidden))
            continue
        output, mass = attention_with_audio_mass(
            *block, audio[:, : earlier + end], softmax_scale=softmax_scale, blocked=hidden
        )
        outputs.append(output)
        masses.append(mass)
    return torch.cat(outputs, dim=1), torch.cat(masses, dim=2) if masses else None


def _side_by_side(tokens: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Completions as right-padded rows; the padding comes after every valid query, so none sees it."""
    if len(lengths) == 1:
        return tokens[None]
    return pad_sequence(list(torch.split(tokens, list(lengths))), batch_first=True)


def _after_prompt(prompt: Tensor, own: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Rows of [prompt | completion], one per completion."""
    rows = _side_by_side(own, lengths)
    return torch.cat((prompt.expand(len(lengths), *prompt.shape), rows), dim=1)


def _valid(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    ends = torch.tensor(lengths, device=device)
    return torch.arange(max(lengths), device=device) < ends[:, None]
