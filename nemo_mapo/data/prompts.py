"""Chat layout: question and audio placeholders as token ids, and the same prompt without any trace of the audio."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nemo_mapo.data.plain_text import control_tokens_in, encode_plain
from nemo_mapo.data.tokenizer import (
    ASSISTANT,
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    USER,
    SpecialTokens,
    completion_text,
    token_id,
)
from nemo_mapo.rows import Prompt
from nemo_mapo.types import Example, Wording

_PREFILL = re.compile(r"\s*<(think|thinking|reasoning)>\s*(?:</\1>\s*)?")
_QUESTION_MARK = "\ue000"
"""Of Unicode's private use: no template writes it."""
_PREFILL_TOKENS = 24
"""Most tokens that a reasoning tag at the end of a prompt takes, its closing tag and line ends included."""


def encode_prompt(
    example: Example, num_audio_tokens: int | Sequence[int], tokenizer: PreTrainedTokenizerBase, wording: Wording
) -> list[int]:
    """Return the ids of one user turn, clip or clips first, up to where the assistant begins.

    A tokenizer with a chat template (Qwen's) lays the turn out by it; else it is
    `<|user|><|audio_start|><|audio|>*N<|audio_end|> question choices: a, b.<|assistant|>`. A question without choices
    has no such list. With `num_audio_tokens` = 0 the markers are left out too: this is the prompt of a text-only model,
    and equals `without_audio` of the prompt with audio. The instruction of `wording` follows the question on a separate
    line. Question, choices and instruction are always plain text, even if they contain control tokens.

    Raises:
        ValueError: the template gives no placeholder for a clip; `wording` has a system message and the tokenizer no
            chat template for it, or the message contains a control token.
    """
    counts = [count for count in _as_list(num_audio_tokens) if count]
    choices = f" choices: {', '.join(example.choices)}." if example.choices else ""
    text = "\n".join([f"{example.question}{choices}", *([wording.instruction] if wording.instruction else [])])
    if tokenizer.chat_template is None:
        if token_id(tokenizer, USER) is None:
            raise ValueError(
                f"data.tokenizer={tokenizer.name_or_path!r} has neither a chat template nor the token {USER}; give the "
                "`tokenizer` directory that examples/import_hf.py makes"
            )
        if wording.system is not None:
            raise ValueError(
                f"data.prompt.system={wording.system!r} needs a tokenizer with a chat template, and data.tokenizer="
                f"{tokenizer.name_or_path!r} has none: set it to null"
            )
        span = f"{AUDIO_START}{AUDIO}{AUDIO_END}" * len(counts)
        ids = _around(f" {text}", f"{USER}{span} {text}{ASSISTANT}", f"{USER}{span}", ASSISTANT, tokenizer)
    else:
        ids = _templated(text, tokenizer, system=wording.system, clips=len(counts))
    special = SpecialTokens.from_tokenizer(tokenizer)
    # Without markers all three are the placeholder.
    marks = dict.fromkeys((special.audio_start_id, special.audio_id, special.audio_end_id))
    if sum(ids.count(token) for token in marks) != len(marks) * len(counts):
        names = ", ".join(tokenizer.convert_ids_to_tokens(list(marks)))
        raise ValueError(
            f"{example.id}: the chat template of data.tokenizer={tokenizer.name_or_path!r} does not give each of the "
            f"{len(counts)} clips its {names}; take the tokenizer of a model that hears"
        )
    filled = iter(counts)
    return [token for one in ids for token in ([one] * next(filled) if one == special.audio_id else [one])]


def _as_list(counts: int | Sequence[int]) -> Sequence[int]:
    return [counts] if isinstance(counts, int) else counts


def _templated(text: str, tokenizer: PreTrainedTokenizerBase, *, system: str | None, clips: int) -> list[int]:
    """The turn in the model's own chat template, each clip as one placeholder."""
    if system is not None and (found := control_tokens_in(system, tokenizer)):
        raise ValueError(f"data.prompt.system={system!r} spells the control token {found[0]}: remove it")
    clip = [{"type": "audio", "audio": ""}] * clips

    def rendered(question: str) -> str:
        turn: Any = {"role": "user", "content": [*clip, {"type": "text", "text": question}]}
        before: list[Any] = (
            [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
        )
        whole: Any = tokenizer.apply_chat_template([*before, turn], add_generation_prompt=True, tokenize=False)
        return str(whole)

    whole = rendered(text)
    if not control_tokens_in(text, tokenizer):
        return _encoded(whole, tokenizer)
    before, _, after = rendered(_QUESTION_MARK).partition(_QUESTION_MARK)
    return _around(whole[len(before) : len(whole) - len(after)], whole, before, after, tokenizer)


def _around(text: str, whole: str, before: str, after: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of `whole` = before + text + after, where `text` comes from a user and the rest from us."""
    if whole != f"{before}{text}{after}":
        raise ValueError(f"the chat template does not show the question once and as it is: {text!r}")
    if not control_tokens_in(text, tokenizer):
        return _encoded(whole, tokenizer)
    return [*_encoded(before, tokenizer), *encode_plain(text, tokenizer), *_encoded(after, tokenizer)]


def _encoded(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def prefill(prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at the end of a prompt that open the completion's reasoning; usually none.

    Some chat templates end in `<think>` (Qwen3-Omni-Thinking's), or in `<think></think>` if thinking is off. Code that
    parses the tags of a completion reads these tokens and the completion as one text.
    """
    last = list(prompt[-_PREFILL_TOKENS:])
    if not re.search(rf"{_PREFILL.pattern}$", tokenizer.decode(last)):
        return []
    tails = (last[-length:] for length in range(1, len(last) + 1))
    return next((tail for tail in tails if _PREFILL.fullmatch(tokenizer.decode(tail))), [])


def whole_text(prompt: Prompt, token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """A completion decoded without its end-of-turn token, preceded by the reasoning opened in its prompt."""
    return completion_text(tokenizer, [*prefill(prompt.token_ids.tolist(), tokenizer), *token_ids])


def shown_prompt(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, bool], ...]:
    """Readable pieces of a prompt: a span of text with False, or one added token (`<|im_start|>`) with True."""
    added = set(tokenizer.added_tokens_decoder)
    stretches = groupby(ids, lambda token: token in added)
    return tuple(
        (text, special)
        for special, tokens in stretches
        for text in (map(tokenizer.decode, tokens) if special else [tokenizer.decode(list(tokens))])
    )


def without_audio(prompt: Prompt, special: SpecialTokens) -> Prompt:
    """The prompt without its audio span and markers: what a text-only model reads."""
    ids = torch.tensor([special.audio_id, special.audio_start_id, special.audio_end_id])
    return replace(prompt, token_ids=prompt.token_ids[~torch.isin(prompt.token_ids, ids)], clips=())
