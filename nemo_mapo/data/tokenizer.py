"""Tokenizers of Hugging Face: loading them, and the special tokens that they must have."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

PAD = "<|pad|>"
END = "<|end|>"
"""End of a turn; the model stops here."""
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
AUDIO_START = "<|audio_start|>"
AUDIO = "<|audio|>"
"""Placeholder; its embedding is replaced by one of the audio's."""
AUDIO_END = "<|audio_end|>"
SALM_AUDIO = "<|audioplaceholder|>"
"""Placeholder of NeMo's SALM."""
THINK_TAGS = ("<think>", "</think>")

CONTROL_TOKENS = (PAD, END, USER, ASSISTANT, AUDIO_START, AUDIO, AUDIO_END)


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids that layout, generation and loss need to know."""

    pad_id: int
    end_id: int
    audio_id: int
    audio_start_id: int
    audio_end_id: int

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "SpecialTokens":
        """Look the ids up, in the first family that the tokenizer has; ValueError names the tokens that it lacks.

        A text LLM's tokenizer to which tokens of audio were added has its own padding and end of a turn; a SALM's has a
        placeholder and no markers, for which the placeholder stands here.
        """
        own = (tokenizer.pad_token, tokenizer.eos_token, AUDIO, AUDIO_START, AUDIO_END)
        salm = (tokenizer.pad_token, tokenizer.eos_token, SALM_AUDIO, SALM_AUDIO, SALM_AUDIO)
        ends_apart = None not in own and tokenizer.pad_token != tokenizer.eos_token
        families = [*SPECIAL_TOKENS.values(), *([own, salm] if ends_apart else [])]
        for tokens in families:
            ids = [found for token in tokens if (found := token_id(tokenizer, token)) is not None]
            if len(ids) == len(tokens):
                return cls(**{field.name: found for field, found in zip(fields(cls), ids, strict=True)})
        missing = [token for token in SPECIAL_TOKENS["nemo_mapo"] if token_id(tokenizer, token) is None]
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} lacks the special tokens {missing}: "
            "examples/assemble.py adds them to that of a text LLM, with rows in the model's embedding; or take that of "
            "a Qwen Omni model"
        )


SPECIAL_TOKENS = {
    "nemo_mapo": (PAD, END, AUDIO, AUDIO_START, AUDIO_END),
    "qwen2_5_omni": ("<|endoftext|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    "qwen3_omni_moe": ("<|endoftext|>", "<|im_end|>", "<|audio_pad|>", "<|audio_start|>", "<|audio_end|>"),
}
"""By family, in the order of the fields of `SpecialTokens`."""


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """The id of a token; None if the vocabulary has no such token. (`get_vocab` copies a large one each time.)"""
    found: int | None = tokenizer.convert_tokens_to_ids(token)
    return None if found == tokenizer.unk_token_id and token != tokenizer.unk_token else found


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the Hugging Face tokenizer in directory `path`; ValueError when there is none."""
    directory = Path(path)
    # Without this file transformers guesses a tokenizer from the name of the directory.
    if not (directory / "tokenizer_config.json").is_file():
        raise ValueError(
            f"data.tokenizer={str(path)!r}: no tokenizer_config.json there; give a Hugging Face tokenizer's directory "
            "(of a model that was brought in, or of the corpus that examples/make_synthetic_corpus.py makes)"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(  # type: ignore[no-untyped-call]
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"data.tokenizer={str(path)!r} holds no usable Hugging Face tokenizer: {error}") from error
    return tokenizer


def completion_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode a completion without its padding and end-of-turn tokens; every other token stays visible."""
    special = SpecialTokens.from_tokenizer(tokenizer)
    kept = [token for token in ids if token not in (special.pad_id, special.end_id)]
    text: str = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
