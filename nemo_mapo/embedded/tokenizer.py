"""The tokenizer of the embedded corpus."""

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nemo_mapo.data.tokenizer import CONTROL_TOKENS, END, PAD, THINK_TAGS
from nemo_mapo.embedded.synthetic_text import template_texts

_VOCABULARY_LIMIT = 1024
"""Never reached: training stops when every word of the templates is one token, near half of it."""
_WORD_PATTERN = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
"""Words and runs of punctuation, each with the blank before it."""


def build_tokenizer(texts: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """Train the tokenizer of a synthetic corpus (without `texts` the embedded one): byte-level BPE, a word a token.

    The blank before a word belongs to it. The result depends on the templates alone. Any text can be encoded: other
    words fall apart into pieces and bytes.
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
        vocab_size=_VOCABULARY_LIMIT,
        min_frequency=1,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_trained_words(template_texts() if texts is None else texts), trainer)
    # Not "special": decoding keeps the tags, which rewards parse.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in THINK_TAGS])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[token for token in CONTROL_TOKENS if token not in (PAD, END)],
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _trained_words(texts: Iterable[str]) -> list[str]:
    """Return the template texts, each word once: equal counts make merges follow what words share, not how often."""
    splitter = pre_tokenizers.Split(Regex(_WORD_PATTERN), behavior="isolated")
    words: dict[str, None] = {}
    for text in texts:
        for part in re.split("|".join(THINK_TAGS), text):
            words.update((word, None) for word, _ in splitter.pre_tokenize_str(part))
    return list(words)
