"""Small real tokenizers of every family, trained on the spot."""

from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from benchmarks.pos_agreement import TEXT, read_parts

PAD, STOP, UNKNOWN = "<|pad|>", "<|im_end|>", "<|unk|>"
LINES = [line for lines in read_parts(TEXT).values() for line in lines]
SMALL_VOCABULARY = 400  # forces most words into several tokens


def byte_level_bpe() -> PreTrainedTokenizerBase:
    """As Qwen3: <think> is an added token that is not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=SMALL_VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=STOP)


def metaspace_bpe() -> PreTrainedTokenizerBase:
    """As Llama's fast tokenizer: ▁ for space, unknown characters as <0xHH> bytes."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=UNKNOWN, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=SMALL_VOCABULARY + len(byte_tokens), special_tokens=[UNKNOWN, *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    # Byte tokens are ordinary vocabulary, not special tokens: rebuild the model around the trained merges.
    plain = Tokenizer.from_str(tokenizer.to_str())
    fast = Tokenizer(plain.model)
    fast.pre_tokenizer, fast.decoder = plain.pre_tokenizer, plain.decoder
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token=PAD, eos_token=STOP)


def whole_words() -> PreTrainedTokenizerBase:
    """A word-level vocabulary; markup has entries of its own."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    split_marks = [pre_tokenizers.Split(mark, "isolated") for mark in (",", ".")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), *split_marks])
    trainer = trainers.WordLevelTrainer(special_tokens=[UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator(["<think> </think>", *LINES], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=STOP, unk_token=UNKNOWN)


def slow_byte_level_bpe(folder: Path) -> PreTrainedTokenizerBase:
    """GPT-2's Python tokenizer over the byte-level vocabulary."""
    byte_level_bpe().backend_tokenizer.model.save(str(folder))
    return GPT2Tokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token=STOP, bos_token=STOP, eos_token=STOP
    )


def slow_sentencepiece(folder: Path) -> PreTrainedTokenizerBase:
    """Llama's Python tokenizer over a sentencepiece model."""
    if not issubclass(LlamaTokenizer, PreTrainedTokenizer):
        pytest.skip("transformers 5 has no Python tokenizer of sentencepiece models")
    prefix = folder / "gate"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(prefix), vocab_size=700, byte_fallback=True,
        model_type="bpe", minloglevel=2,
    )  # fmt: skip
    return LlamaTokenizer(f"{prefix}.model", legacy=True, add_bos_token=False)
