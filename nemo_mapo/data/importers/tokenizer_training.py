"""Tokenizers for your text: trained on prompts and completions, or the decoder's own."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nemo_mapo.data.tokenizer import CONTROL_TOKENS, END, PAD, SpecialTokens, load_tokenizer
from nemo_mapo.rewards.templates import ALL_TAGS, INSTRUCTIONS

_WORD_PATTERN = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
"""Words and runs of punctuation, each with the blank before it."""

TRAIN = "train"
"""Value of `--tokenizer` instead of a directory."""


def byte_level_bpe(
    texts: Iterable[str], *, vocabulary: int, min_frequency: int, tags: Sequence[str]
) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on texts; it encodes any text, falling back to pieces and bytes for unseen words.

    The blank before a word belongs to it. The result depends only on the texts and their order. Each of `tags` is one
    token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=min_frequency,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Not "special": decoding keeps the tags, which rewards parse.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[token for token in CONTROL_TOKENS if token not in (PAD, END)],
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def words_of(texts: Iterable[str], tags: Sequence[str]) -> list[str]:
    """Each word of the texts once, without tags: with equal counts, merges follow what words share, not frequency."""
    splitter = pre_tokenizers.Split(Regex(_WORD_PATTERN), behavior="isolated")
    words: dict[str, None] = {}
    for text in texts:
        for part in re.split("|".join(tags), text):
            words.update((word, None) for word, _ in splitter.pre_tokenize_str(part))
    return list(words)


def own_tokenizer(choice: str, texts: Iterable[str], *, vocabulary: int) -> PreTrainedTokenizerBase:
    """A tokenizer trained on `texts` and the instructions of the templates, or that in directory `choice`.

    Raises:
        ValueError: no tokenizer there, one without audio tokens, or too few entries for bytes and tags.
    """
    if choice != TRAIN:
        tokenizer = load_tokenizer(Path(choice))
        SpecialTokens.from_tokenizer(tokenizer)
        return tokenizer
    fewest = len(CONTROL_TOKENS) + len(pre_tokenizers.ByteLevel.alphabet())
    if vocabulary < fewest:
        raise ValueError(f"--vocabulary {vocabulary}: bytes and control tokens alone are {fewest}; give more")
    asked = [text for text in INSTRUCTIONS.values() if text is not None]
    # Tags inside texts are tokens of their own already.
    plain = (re.sub("|".join(ALL_TAGS), " ", text) for text in [*texts, *asked])
    return byte_level_bpe(plain, vocabulary=vocabulary, min_frequency=1, tags=ALL_TAGS)
