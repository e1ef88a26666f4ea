"""The tokenizer of the embedded corpus."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

from nemo_mapo.data.importers.tokenizer_training import byte_level_bpe, words_of
from nemo_mapo.data.tokenizer import THINK_TAGS
from nemo_mapo.embedded.synthetic_text import template_texts

_VOCABULARY_LIMIT = 1024
"""Never reached: training stops when every word of the templates is one token, near half of it."""


def build_tokenizer(texts: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """Train the tokenizer of a synthetic corpus (without `texts` the embedded one): byte-level BPE, one token per word.

    The result depends only on the texts. Any text can be encoded: other words become several pieces or bytes.
    """
    words = words_of(template_texts() if texts is None else texts, THINK_TAGS)
    return byte_level_bpe(words, vocabulary=_VOCABULARY_LIMIT, min_frequency=1, tags=THINK_TAGS)
