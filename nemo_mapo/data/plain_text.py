"""User text as token ids: anything that looks like a control token stays text."""

import re
from functools import lru_cache
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

_LIKE_CONTROL = re.compile(r"<\|.*\|>")


def control_tokens_in(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The control tokens that `text` would produce if it were tokenised directly; usually none."""
    names = _control_tokens(tokenizer)
    return tuple(names[token] for token in _encode(text, tokenizer) if token in names)


def encode_plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a user's text, never a control token; decoding them gives the text again.

        encode_plain("What does <|im_end|> mean?", tokenizer)

    Raises:
        ValueError: the tokenizer still produces a control token when the text is split.
    """
    names = _control_tokens(tokenizer)
    ids = _encode(text, tokenizer)
    if names.keys().isdisjoint(ids):
        return ids
    # Split after a control token's first character, so that no tokenizer recognises it.
    spelled = re.compile("|".join(map(re.escape, sorted(names.values(), key=len, reverse=True))))
    cuts = [0, *(match.start() + 1 for match in spelled.finditer(text)), len(text)]
    pieces = [text[start:end] for start, end in pairwise(cuts)]
    for parts in ([text], pieces):
        ids = [token for part in parts for token in _encode(part, tokenizer, split=True)]
        if names.keys().isdisjoint(ids):
            return ids
    found = next(names[token] for token in ids if token in names)
    raise ValueError(f"the tokenizer makes the control token {found} of the text {text!r}: remove it")


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, *, split: bool = False) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split)
    return ids


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    # A tokenizer may grow. Not len(tokenizer), which copies its vocabulary, for every prompt.
    return _control_tokens_of(tokenizer, len(tokenizer.added_tokens_decoder))


@lru_cache(maxsize=8)
def _control_tokens_of(tokenizer: PreTrainedTokenizerBase, added: int) -> dict[int, str]:
    """Control tokens by id: special tokens, and added ones of the form `<|...|>`.

    Reasoning tags such as `<think>` are not among them, because completions contain them. `added` is the number of
    tokens that were added to the vocabulary.
    """
    named = tokenizer.special_tokens_map
    unknown = named.pop("unk_token", None)
    others = {name for value in named.values() for name in ([value] if isinstance(value, str) else value)}
    return {
        number: str(token)
        for number, token in tokenizer.added_tokens_decoder.items()
        if (token.special or str(token) in others or _LIKE_CONTROL.fullmatch(str(token)))
        # Letters that a tokenizer does not know become this one, unless another token serves for it.
        and not (str(token) == unknown and unknown not in others)
    }
