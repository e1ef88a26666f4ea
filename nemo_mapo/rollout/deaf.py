"""Generation in which chosen tokens do not attend to the audio, to see how the completion changes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nemo_mapo.attention.session import Deafness
from nemo_mapo.models.layout import SEQUENCE_SEGMENT, left_padded
from nemo_mapo.rows import Prompt


@dataclass(frozen=True, kw_only=True)
class DeafTokens:
    """Completion tokens, counted from 0, that are read or drawn without attention to the audio: `first` to `end` - 1.

    A token is drawn at the position before it, so that position does not attend to the audio. What earlier tokens
    heard stays in their hidden states, which deaf tokens read as usual.

        late = DeafTokens(first=torch.tensor([20]), end=torch.tensor([1000]))
    """

    first: Int[Tensor, " row"]
    """By row; in generation by prompt, for all completions of its group."""
    end: Int[Tensor, " row"]
    prompt_text: bool = False
    """Whether the prompt's text is deaf as well, up to the position that draws the first token."""
    text_rows: Bool[Tensor, " row"] | None = None
    """Rows whose prompt text is deaf if `prompt_text` says so; None is all of them. Training only."""
    layers: tuple[int, ...] | None = None
    """0-based decoder layers; None is all of them."""

    def includes(self, rows: Int[Tensor, "row *one"], token: Int[Tensor, "row *time"]) -> Bool[Tensor, "row *time"]:
        """Whether completion token number `token` of each of these rows is deaf."""
        first, end = (bounds.to(token.device)[rows] for bounds in (self.first, self.end))
        return (first <= token) & (token < end)

    def of(self, rows: slice | list[int]) -> "DeafTokens":
        """The same for some of the rows."""
        text_rows = None if self.text_rows is None else self.text_rows[rows]
        return replace(self, first=self.first[rows], end=self.end[rows], text_rows=text_rows)


class DeafGeneration:
    """Gives for every pass of a generation its deaf tokens, and the audio keys of the cache."""

    def __init__(self, deaf: DeafTokens, prompts: Sequence[Prompt], *, audio_token_id: int, group_size: int) -> None:
        """Of one call; ValueError if `deaf` is not about these prompts."""
        if not len(deaf.first) == len(deaf.end) == len(prompts):
            raise ValueError(
                f"deaf tokens are given for {len(deaf.first)} and {len(deaf.end)} prompts, there are {len(prompts)}"
            )
        self.deaf = deaf
        self.group_size = group_size
        tokens, segment_ids = left_padded(prompts, pad_id=0)
        self._audio = (tokens == audio_token_id) & (segment_ids == SEQUENCE_SEGMENT)

    def prompts(self, numbers: Sequence[int], width: int) -> Deafness:
        """For reading these prompts, left-padded to `width`."""
        chosen = torch.tensor(numbers)
        audio = self._audio[chosen, self._audio.shape[1] - width :]
        queries = ~audio if self.deaf.prompt_text else torch.zeros_like(audio)
        queries[:, -1] = self.deaf.includes(chosen, torch.zeros_like(chosen))
        return Deafness(queries=queries, audio_keys=audio, layers=self.deaf.layers)

    def step(self, rows: Int[Tensor, " live"], drawn: Int[Tensor, " live"], position: int) -> Deafness:
        """For reading the last of the `drawn` tokens of each row, which stands at `position` of the cache."""
        prompts = rows // self.group_size
        whole = self._audio.to(rows.device)[prompts]
        # Prompts ended one position before the first drawn token; positions left and right of them are not audio.
        source = torch.arange(position + 1, device=rows.device) - (position - drawn + 1)[:, None] + whole.shape[1]
        inside = (source >= 0) & (source < whole.shape[1])
        audio = whole.gather(1, source.clamp(0, whole.shape[1] - 1)) & inside
        deaf = self.deaf.includes(prompts, drawn)
        return Deafness(queries=deaf[:, None], audio_keys=audio, layers=self.deaf.layers)
