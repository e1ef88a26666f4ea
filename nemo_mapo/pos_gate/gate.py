"""The part-of-speech gate g_t: which tokens of a completion carry substance (paper Eq. 3 and Appendix E)."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from nemo_mapo.pos_gate.surface import Surface, SurfaceReader
from nemo_mapo.pos_gate.tagger import UNIVERSAL_TAGS, Tagger, default_tagger
from nemo_mapo.pos_gate.words import sentences_of

FallbackReason = Literal["empty", "misaligned", "no_substantive_token"]


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """The gate of one completion."""

    gate: tuple[bool, ...]
    """g_t for every token id given, trailing padding included (False there)."""
    fallback: FallbackReason | None
    """Why the gate is all ones over the real tokens instead of following the tags; None if it follows them."""


class GateBatch(NamedTuple):
    """The gates of several completions."""

    gates: list[tuple[bool, ...]]
    """Of each completion, True on the tokens of a substantive word."""
    fallbacks: dict[str, int]
    """Completions that fell back, by reason; reasons that did not occur are left out."""


def pos_token_gate(
    token_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    tags: Collection[str],
    tagger: Tagger | None = None,
    words: Collection[str] = (),
) -> GateResult:
    """Gate the tokens of one completion by the part of speech of the word they belong to.

    g_t = 1 where token t carries a character of a word with a part tagged as one of `tags`. All tokens of a word share
    its gate; a contraction is one word, substantive when its host or its clitic is (don't = do + n't). Special
    tokens, markup such as `<think>` or `</answer>` (also spelled over several tokens), punctuation and white space
    are never substantive.

    Without a usable gate the real tokens, all but the trailing padding, get ones, and `fallback` says why:
    `misaligned` (tokens cannot be laid over the decoded text), `no_substantive_token`, or `empty` (no real token at
    all; its gate is all False).

    Args:
        token_ids: a completion, its stop token included; trailing pad ids are allowed.
        tokenizer: a Hugging Face tokenizer, fast or slow.
        tags: universal tags that count as substantive.
        tagger: from `build_tagger`; None takes `default_tagger()`.
        words: substantive whatever their tag, in any case.

    Raises:
        ValueError: `tags` is empty or names something that is not a universal tag.
    """
    substantive = _checked_tags(tags)
    chosen = _Substantive(tags=substantive, words=_folded(words))
    return _gate(token_ids, SurfaceReader(tokenizer), tokenizer, chosen, tagger or default_tagger())


def gate_batch(
    completions: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    tags: Collection[str],
    tagger: Tagger,
    words: Collection[str] = (),
) -> GateBatch:
    """Gate several completions (see `pos_token_gate`); ValueError for bad `tags`."""
    substantive = _checked_tags(tags)
    reader = SurfaceReader(tokenizer)
    chosen = _Substantive(tags=substantive, words=_folded(words))
    results = [_gate(completion, reader, tokenizer, chosen, tagger) for completion in completions]
    fallbacks = Counter[str](result.fallback for result in results if result.fallback is not None)
    return GateBatch([result.gate for result in results], dict(fallbacks))


class _Substantive(NamedTuple):
    """What makes a word substantive."""

    tags: frozenset[str]
    words: frozenset[str]


def _folded(words: Collection[str]) -> frozenset[str]:
    return frozenset(word.casefold() for word in words)


def _checked_tags(tags: Collection[str]) -> frozenset[str]:
    known = UNIVERSAL_TAGS - {"."}
    unknown = sorted(set(tags) - known)
    if not tags or unknown:
        raise ValueError(f"tags={sorted(tags)}: {unknown or 'none'} given; choose from {sorted(known)}")
    return frozenset(tags)


def _gate(
    token_ids: Sequence[int],
    reader: SurfaceReader,
    tokenizer: PreTrainedTokenizerBase,
    chosen: _Substantive,
    tagger: Tagger,
) -> GateResult:
    real = _real_length(token_ids, tokenizer)
    padding = (False,) * (len(token_ids) - real)
    if real == 0:
        return GateResult(gate=padding, fallback="empty")
    all_ones = (True,) * real + padding
    surface = reader.read(token_ids[:real])
    if surface is None:
        return GateResult(gate=all_ones, fallback="misaligned")
    tokens = _substantive_tokens(surface, chosen, tagger)
    if not tokens:
        return GateResult(gate=all_ones, fallback="no_substantive_token")
    return GateResult(gate=tuple(index in tokens for index in range(real)) + padding, fallback=None)


def _real_length(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the tokens before the trailing padding; where pad doubles as stop token, the first of the run is real."""
    pad = tokenizer.pad_token_id
    length = len(token_ids)
    while length and token_ids[length - 1] == pad:
        length -= 1
    return length + (length < len(token_ids) and pad == tokenizer.eos_token_id)


def _substantive_tokens(surface: Surface, chosen: _Substantive, tagger: Tagger) -> frozenset[int]:
    return frozenset(
        token
        for token, found, word in _word_tags(surface, tagger)
        if chosen.tags.intersection(found) or word.casefold() in chosen.words
    )


def _word_tags(surface: Surface, tagger: Tagger) -> Iterator[tuple[int, tuple[str, ...], str]]:
    """Every token that carries a character of a word, with the tags of the word's parts, and the word; once for each
    character."""
    for sentence in sentences_of(surface.text):
        tagged = iter(tagger.tag([part for unit in sentence for part in unit.parts]))
        for unit in sentence:
            tags = tuple(next(tagged)[1] for _ in unit.parts)
            if unit.is_word:
                word = surface.text[unit.start : unit.end]
                yield from ((token, tags, word) for owners in surface.owners[unit.start : unit.end] for token in owners)


def pos_token_tags(
    token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, tagger: Tagger
) -> tuple[str | None, ...]:
    """The universal tag of the word that each token belongs to; None for markup, marks and padding (Fig. 7).

    A contraction has its host's tag; a token of two words, the first one's. All None if the tokens cannot be laid
    over the text (see `pos_token_gate`).
    """
    tags: list[str | None] = [None] * len(token_ids)
    real = _real_length(token_ids, tokenizer)
    surface = SurfaceReader(tokenizer).read(token_ids[:real]) if real else None
    if surface is not None:
        for token, found, _ in _word_tags(surface, tagger):
            tags[token] = tags[token] or found[0]
    return tuple(tags)
