"""Which characters of a completion each of its tokens carries, for byte-level, sentencepiece and word tokenizers."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")
_SPACE_RUN = re.compile(r"\s+")
_REPLACEMENT_RUN = re.compile("\ufffd+")
_METASPACE = "\u2581"
_WORDPIECE_PREFIX = "##"


@dataclass(frozen=True, kw_only=True)
class Surface:
    """A completion's text and where its tokens lie in it."""

    text: str
    owners: tuple[tuple[int, ...], ...]
    """For each character of `text` the tokens that carry it: several where a character's bytes are spread."""


def _byte_level_alphabet() -> dict[str, int]:
    """Invert GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 stays, the rest counts up from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(hidden)}


_BYTE_LEVEL_ALPHABET = _byte_level_alphabet()


def _byte_level(token: str) -> bytes | None:
    if not all(character in _BYTE_LEVEL_ALPHABET for character in token):
        return None
    return bytes(_BYTE_LEVEL_ALPHABET[character] for character in token)


def _sentencepiece(token: str) -> bytes | None:
    byte = _BYTE_TOKEN.match(token)
    if byte:
        return bytes([int(byte[1], 16)])
    return token.replace(_METASPACE, " ").encode()


def _whole_words(token: str) -> bytes | None:
    if token.startswith(_WORDPIECE_PREFIX):
        return token.removeprefix(_WORDPIECE_PREFIX).encode()
    return f" {token}".encode()


Spelling = Callable[[str], bytes | None]
"""Vocabulary entry to the bytes it stands for; None if the entry is not written in this spelling."""

_SPELLINGS: tuple[Spelling, ...] = (_byte_level, _sentencepiece, _whole_words)


class SurfaceReader:
    """Lays the tokens of completions over their text.

    How a vocabulary spells text is not asked of the tokenizer but tried: a spelling is right when it gives back what
    the tokenizer itself decodes; where none does the completion is misaligned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = {token_id: str(token).encode() for token_id, token in tokenizer.added_tokens_decoder.items()}
        self._fixed = added | {token_id: b"\n" for token_id in tokenizer.all_special_ids}
        self._spellings = list(_SPELLINGS)

    def read(self, token_ids: Sequence[int]) -> Surface | None:
        """Return text and token positions, or None if no spelling reproduces the tokenizer's own decoding.

        A special token stands as a line break, so that no word or sentence runs across it.
        """
        ids = list(token_ids)
        tokens = self._tokenizer.convert_ids_to_tokens(ids)
        # What was added to a vocabulary is its own text, which byte-level decoders get wrong beyond ASCII.
        ordinary = [index for index, token_id in enumerate(ids) if token_id not in self._fixed]
        decoded = self._tokenizer.decode(
            [ids[index] for index in ordinary], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        for spelling in self._spellings:
            pieces = [self._piece(token_id, token, spelling) for token_id, token in zip(ids, tokens, strict=True)]
            complete = [piece for piece in pieces if piece is not None]
            if len(complete) < len(pieces):
                continue
            spelled = b"".join(complete[index] for index in ordinary).decode(errors="replace")
            # Decoders of whole words set spaces by rules of their own (before a full stop, say).
            space = "" if spelling is _whole_words else " "
            if _comparable(spelled, space) == _comparable(decoded, space):
                self._spellings.sort(key=lambda candidate: candidate is not spelling)
                return _lay_out(complete)
        return None

    def _piece(self, token_id: int, token: str | None, spelling: Spelling) -> bytes | None:
        if token_id in self._fixed:
            return b" " + self._fixed[token_id] if spelling is _whole_words else self._fixed[token_id]
        return None if token is None else spelling(token)


def _comparable(text: str, space: str) -> str:
    """Forget the length of white space and of undecodable runs, which decoders render differently."""
    return _REPLACEMENT_RUN.sub("\ufffd", _SPACE_RUN.sub(space, text)).strip()


def _lay_out(pieces: list[bytes]) -> Surface:
    byte_owner = [index for index, piece in enumerate(pieces) for _ in piece]
    # A byte that is not valid UTF-8 (a character truncated at the length limit) becomes one lone surrogate.
    text = b"".join(pieces).decode(errors="surrogateescape")
    owners = []
    offset = 0
    for character in text:
        width = len(character.encode(errors="surrogateescape"))
        owners.append(tuple(dict.fromkeys(byte_owner[offset : offset + width])))
        offset += width
    return Surface(text=text, owners=tuple(owners))
