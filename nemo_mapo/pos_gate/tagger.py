"""Part-of-speech tagging with NLTK: words of a sentence to universal tags, with or without NLTK's data."""

import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from nltk.tag import DefaultTagger, RegexpTagger, UnigramTagger
from nltk.tag.brill import BrillTagger, Pos, Word
from nltk.tag.perceptron import PerceptronTagger
from nltk.tbl.rule import Rule

from nemo_mapo.pos_gate.lexicon import universal_lexicon

TaggedWords = list[tuple[str, str]]

PERCEPTRON_PACKAGE = "averaged_perceptron_tagger_eng"
CHAIN_NAME = "lexicon_affix_chain"

DOWNLOAD_TIMEOUT_SECONDS = 8.0
"""The package is 1.5 MB; a host that needs longer is treated as offline."""
SENTENCE_CACHE_SIZE = 16384
"""Distinct sentences remembered; completions of one group share many."""

UNIVERSAL_TAGS = frozenset({"NOUN", "VERB", "ADJ", "ADV", "PRON", "DET", "ADP", "NUM", "CONJ", "PRT", "X", "."})
"""The twelve classes of the universal tag set (Petrov, Das and McDonald 2012)."""

_PENN_BY_UNIVERSAL = {
    "NOUN": "NN NNS NNP NNPS",
    "VERB": "VB VBD VBG VBN VBP VBZ MD",
    "ADJ": "JJ JJR JJS",
    "ADV": "RB RBR RBS WRB",
    "PRON": "PRP PRP$ WP WP$",
    "DET": "DT PDT WDT EX",
    "ADP": "IN",
    "NUM": "CD",
    "CONJ": "CC",
    "PRT": "RP TO POS",
    "X": "FW LS SYM UH",
    ".": ". , : ; ( ) -LRB- -RRB- `` '' $ #",
}
PENN_TO_UNIVERSAL = {penn: universal for universal, tags in _PENN_BY_UNIVERSAL.items() for penn in tags.split()}

AFFIX_RULES = [
    (r"^[\W_]+$", "."),
    (r"^[-+]?\d[\d.,:/%]*$", "NUM"),
    (r"^\d+(st|nd|rd|th)$", "ADJ"),
    (r"^\d", "NOUN"),
    (r".*(.)\1\1", "X"),  # shhh, zzz, brrring
    (r"^[^aeiouy\W\d]{2,}$", "X"),  # hm, pfft, tsk
    (r"^(\w)\w{1,4}(-\1\w{1,4})+$", "X"),  # clip-clop, ding-dong
    (r"^\w+(-\w+)+$", "ADJ"),
    (r".*(tion|sion|ment|ness|ity|ance|ence|ism|ist|ship|hood|ture|ology|ee|or)s?$", "NOUN"),
    (r".*(ize|ise|ify)(s|d)?$", "VERB"),
    (r".{2,}ing$", "VERB"),
    (r".{2,}ed$", "VERB"),
    (r".{2,}ly$", "ADV"),
    (r".{2,}(ous|ful|less|able|ible|ive|ic|ical|al|ish|ary|est)$", "ADJ"),
]
"""Endings (and beginnings), first match wins; what none of them knows is a noun."""

_ARTICLES = ("a", "an", "the")
_EXISTENTIAL_VERBS = ("is", "are", "was", "were", "'s", "may", "might", "must", "could", "should", "has", "have")


def _rule(old: str, new: str, *conditions: tuple[Word | Pos, str]) -> Rule:
    return Rule("grounding", old, new, list(conditions))


CONTEXT_RULES = [
    # ", so the sweep peaks" joins clauses; "so loud" measures and "So the sweep peaks." concludes, both adverbs.
    *(
        _rule("ADV", "ADP", (Word([0]), "so"), (Word([-1]), ","), (Pos([1]), clause))
        for clause in ("DET", "PRON", "NOUN")
    ),
    *(_rule("ADV", "DET", (Word([0]), "there"), (Word([1]), verb)) for verb in _EXISTENTIAL_VERBS),
    *(_rule("ADP", "ADV", (Word([0]), word), (Pos([1]), "NUM")) for word in ("about", "around", "over", "under")),
    _rule("VERB", "PRT", (Word([0]), "'s"), (Pos([-1]), "NOUN")),
    # "a hum." and "the sounds of": what an article opens and no noun follows is the noun itself.
    *(
        _rule("VERB", "NOUN", (Word([-1]), article), (Pos([1]), end))
        for article in _ARTICLES
        for end in (".", "VERB", "ADP", "CONJ", "DET")
    ),
]
"""Corrections by neighbours, in Brill's form, applied in order after the chain."""


@dataclass(frozen=True, kw_only=True)
class Tagger:
    """A named part-of-speech tagger over one sentence.

    `tag` takes the words and punctuation marks of a sentence, clitics split off as in the Penn Treebank (do n't), and
    returns each with its universal tag. It is pure and safe to call from a worker thread.
    """

    name: str
    tag: Callable[[Sequence[str]], TaggedWords]


def build_tagger(download: bool = True) -> Tagger:
    """Choose the best tagger this machine can run and log which one it is.

    The averaged perceptron where its data is installed (`NLTK_DATA`, `~/nltk_data`, ...) or, if `download`, can be
    fetched within `DOWNLOAD_TIMEOUT_SECONDS`; otherwise the chain closed-class lexicon, affix rules, noun, which
    needs no data.
    """
    perceptron = _load_perceptron()
    if perceptron is None and download and _download_perceptron():
        perceptron = _load_perceptron()
    if perceptron is None:
        logging.getLogger(__name__).warning(
            "part-of-speech gate: NLTK data %r is not available, using %s (see docs/pos_gate.md)",
            PERCEPTRON_PACKAGE,
            CHAIN_NAME,
        )
        return build_chain_tagger()
    logging.getLogger(__name__).info("part-of-speech gate: using %s", PERCEPTRON_PACKAGE)
    return _perceptron_tagger(perceptron)


@cache
def default_tagger() -> Tagger:
    """Return the tagger of callers that bring none: `build_tagger` without network, built once per process."""
    return build_tagger(download=False)


def build_chain_tagger() -> Tagger:
    """Build the tagger that needs no data: closed-class lexicon, then affix rules, then noun; then context rules."""
    noun = DefaultTagger("NOUN")
    affixes = RegexpTagger(AFFIX_RULES, backoff=noun)
    lexicon = UnigramTagger(model=universal_lexicon(), backoff=affixes)
    chain = BrillTagger(lexicon, CONTEXT_RULES)

    def tag(words: tuple[str, ...]) -> TaggedWords:
        tagged = chain.tag([word.lower() for word in words])
        return [(word, _sober(word, universal)) for word, (_, universal) in zip(words, tagged, strict=True)]

    return Tagger(name=CHAIN_NAME, tag=_remember(tag))


def _perceptron_tagger(perceptron: PerceptronTagger) -> Tagger:
    def tag(words: tuple[str, ...]) -> TaggedWords:
        # The perceptron learned from edited text, where the pronoun is a capital.
        tagged = perceptron.tag(["I" if word == "i" else word for word in words])
        return [(word, _sober(word, PENN_TO_UNIVERSAL[penn])) for word, (_, penn) in zip(words, tagged, strict=True)]

    return Tagger(name=PERCEPTRON_PACKAGE, tag=_remember(tag))


def _remember(tag: Callable[[tuple[str, ...]], TaggedWords]) -> Callable[[Sequence[str]], TaggedWords]:
    remembered = lru_cache(maxsize=SENTENCE_CACHE_SIZE)(lambda words: tuple(tag(words)))
    return lambda words: list(remembered(tuple(words)))


def _sober(word: str, universal: str) -> str:
    """Keep "." for marks without letter or digit, and for nothing else: an unclassified word is X."""
    if not any(character.isalnum() for character in word):
        return "."
    return "X" if universal == "." else universal


def _load_perceptron() -> PerceptronTagger | None:
    try:
        return PerceptronTagger()
    except LookupError:
        return None


def _download_perceptron() -> bool:
    """Fetch the perceptron's data in a child process, which can be stopped when a name look-up or a proxy hangs."""
    script = f"import sys, nltk; sys.exit(0 if nltk.download({PERCEPTRON_PACKAGE!r}, quiet=True) else 1)"
    try:
        child = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=DOWNLOAD_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return child.returncode == 0
