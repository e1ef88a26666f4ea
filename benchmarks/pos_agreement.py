"""How far the data-free tagger agrees with the averaged perceptron on audio reasoning.

Prints, for each part of tests/unit/pos_gate/reasoning_text.txt or for a text of your own, the share of tokens whose
gate agrees, the same over word tokens only, and the share of words whose universal tag agrees. Needs NLTK's
averaged_perceptron_tagger_eng:

    NLTK_DATA=<dir with taggers/> python benchmarks/pos_agreement.py [--text FILE] [--words 12]
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.pos_gate.gate import pos_token_gate
from nemo_mapo.pos_gate.tagger import PERCEPTRON_PACKAGE, Tagger, build_chain_tagger, build_tagger
from nemo_mapo.pos_gate.words import sentences_of

TEXT = Path(__file__).resolve().parent.parent / "tests" / "unit" / "pos_gate" / "reasoning_text.txt"
VOCABULARY_SIZE = 1200
"""About as many subwords a word as a large vocabulary needs on unseen text."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Shares in 0..1, and the words behind them."""

    tokens: float
    """Tokens (marks and spaces included) with the same gate."""
    word_tokens: float
    """The same over tokens with a letter or digit."""
    tags: float
    """Words, clitics split off, with the same universal tag."""
    words: int
    """Words compared."""
    disagreements: Counter[tuple[str, str, str]]
    """(word, perceptron's tag, chain's tag) where the gate differs."""


def read_parts(path: Path) -> dict[str, list[str]]:
    """Read a text with one thought a line, `## name` opening a part and `#` a comment."""
    parts: dict[str, list[str]] = {}
    lines = parts.setdefault("text", [])
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            lines = parts.setdefault(line.removeprefix("## ").strip(), [])
        elif line.strip() and not line.startswith("#"):
            lines.append(line)
    return {name: lines for name, lines in parts.items() if lines}


def byte_level_tokenizer(lines: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a small byte-level BPE, so that words fall into several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def measure(
    lines: Sequence[str], tokenizer: PreTrainedTokenizerFast, tags: Sequence[str], truth: Tagger, other: Tagger
) -> Agreement:
    """Compare two taggers on `lines`, each line a completion of its own."""
    same = same_words = tokens = word_tokens = 0
    for line in lines:
        ids = tokenizer.encode(line)
        gates = [pos_token_gate(ids, tokenizer, tags, tagger).gate for tagger in (truth, other)]
        for token, left, right in zip(tokenizer.convert_ids_to_tokens(ids), *gates, strict=True):
            in_word = any(character.isascii() and character.isalnum() for character in token)
            tokens, same = tokens + 1, same + (left == right)
            word_tokens, same_words = word_tokens + in_word, same_words + (in_word and left == right)
    pairs = [
        (word, left, right)
        for line in lines
        for sentence in sentences_of(line)
        for (word, left), (_, right) in zip(
            *(tagger.tag([part for unit in sentence for part in unit.parts]) for tagger in (truth, other)), strict=True
        )
        if left != "."
    ]
    substantive = frozenset(tags)
    return Agreement(
        tokens=same / tokens,
        word_tokens=same_words / word_tokens,
        tags=sum(left == right for _, left, right in pairs) / len(pairs),
        words=len(pairs),
        disagreements=Counter(
            (word.lower(), left, right)
            for word, left, right in pairs
            if (left in substantive) != (right in substantive)
        ),
    )


def main() -> None:
    """Print the agreement for every part of the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=TEXT, help="one thought a line; '## name' opens a part")
    parser.add_argument("--words", type=int, default=12, help="disagreeing words to print for each part")
    arguments = parser.parse_args()
    perceptron = build_tagger(download=False)
    if perceptron.name != PERCEPTRON_PACKAGE:
        parser.exit(1, f"NLTK data {PERCEPTRON_PACKAGE!r} not found; set NLTK_DATA to the folder that holds taggers/\n")
    tags = ObjectiveConfig().pos_tags
    parts = read_parts(arguments.text)
    tokenizer = byte_level_tokenizer([line for lines in parts.values() for line in lines])
    for name, lines in parts.items():
        agreement = measure(lines, tokenizer, tags, perceptron, build_chain_tagger())
        print(
            f"{name}: {len(lines)} lines, {agreement.words} words: gate agreement {agreement.tokens:.2%} of tokens, "
            f"{agreement.word_tokens:.2%} of word tokens; tag agreement {agreement.tags:.2%} of words"
        )
        for (word, left, right), count in agreement.disagreements.most_common(arguments.words):
            print(f"  {count} x {word}: {left} (perceptron), {right} (chain)")


if __name__ == "__main__":
    main()
