"""Consistency: does the reasoning lead to the given answer, without being truncated?"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from nemo_mapo.config.rewards import RewardsConfig
from nemo_mapo.rewards.answers import resolve_choice
from nemo_mapo.rewards.protocol import RewardSample
from nemo_mapo.rewards.templates import closed_reasoning, extract_answer

_MARK = "\ue000{}\ue001"
"""Marks a mention of choice {} while a sentence is parsed; private-use characters, so never in the text."""
_MARKED = re.compile("\ue000(\\d+)\ue001")

_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n+")
_VERDICT = re.compile(r"\s*\?\s*(yes|no)\b", re.IGNORECASE)
_CLAUSE_END = re.compile(
    r",|\b(?:but|so|therefore|thus|hence|while|whereas|because|although|though)\b|\band (?=(?:it|this|that|the)\b)",
    re.IGNORECASE,
)
_LISTING = re.compile(r"\b(?:options|choices|candidates)\b\s*(?:are|were|include|:)", re.IGNORECASE)
_LABEL_MENTION = re.compile(
    r"(?:\b(?:answer|option|choice)\s*(?:is\b\s*)?:?\s*\(?\s*(?P<named>[A-Za-z])\s*\)?(?=\s*(?:[.,;:!?)]|$)))"
    r"|\b(?:option|choice)\s+(?P<capital>(?-i:[A-Z]))\b"
    r"|\(\s*(?P<round>[A-Za-z])\s*\)|\b(?P<open>[A-Z])\)",
    re.IGNORECASE,
)
_NO_NEGATION = re.compile(r"\bno (?:doubt|question)\b", re.IGNORECASE)
_NEGATION_BEFORE = re.compile(
    r"(?:\b(?:not|never|no|neither|nor|cannot|without|unlike|unlikely|except|rather than|instead of|(?:rule|rules|ruled"
    r"|ruling) out|exclud\w+|eliminat\w+|reject\w*)\b|n't\b)",
    re.IGNORECASE,
)
_NEGATION_AFTER = re.compile(
    r"\s*(?:[:-]\s*)?(?:(?:no|not)\s*(?:[.;!]|$)"
    r"|(?:(?:is|was|are|were|seems?|sounds?|looks?|can be|must be)\s+)?"
    r"(?:not|wrong|incorrect|unlikely|less likely|impossible|false|ruled out|excluded|eliminated|out)\b(?!\s*\ue000)"
    r"|(?:is|was|are|were|does|do|did|can|could|would|must|should)(?:n't\b|\s*not\b))",
    re.IGNORECASE,
)
_WEIGHING_BEFORE = re.compile(r"\b(?:between|among|from|whether|either|if)\b", re.IGNORECASE)
_CUT_OFF = re.compile(
    r"(?:[,:\u2013\u2014-]|\.\.\.|\u2026|\b(?:a|an|the|of|to|and|or|but|so|because|is|are|was|were|seems|sounds|with|than"
    r"|if|therefore|which))$",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The choices that one sentence speaks for and against."""

    affirmed: frozenset[int]
    rejected: frozenset[int]


class RuleConsistency:
    """1 (YES) if the reasoning is complete and concludes the final answer and nothing else, else 0 (r_cons).

    A rule for templated text such as the embedded run writes, in place of a judge model; for real models use
    `JudgeConsistency`. Whether the answer is right does not matter. YES requires all of these:

    - the completion finished, its reasoning is closed and does not break off (see `_CUT_OFF`);
    - the final answer resolves to a choice;
    - going back from the end of the reasoning, the first sentence that speaks *for* a choice speaks for that choice
      alone, and no sentence from there on speaks against it.

    Questions, listings of the options and weighing ("between x and y") speak for nothing, except that "x? yes." and
    "x? no." do.
    """

    name = "consistency"

    def __init__(self, config: RewardsConfig) -> None:
        self._template = config.template

    def __call__(self, samples: Sequence[RewardSample]) -> list[float]:
        """Return 0 or 1 for every sample."""
        return [float(self._is_consistent(sample)) for sample in samples]

    def _is_consistent(self, sample: RewardSample) -> bool:
        choices = sample.example.choices
        reasoning = closed_reasoning(sample.text, self._template)
        answer = resolve_choice(extract_answer(sample.text, self._template, finished=sample.finished), choices)
        if not sample.finished or not reasoning or answer is None or _CUT_OFF.search(reasoning):
            return False
        return concludes(reasoning, answer, choices)


def concludes(reasoning: str, answer: int, choices: Sequence[str]) -> bool:
    """Tell whether the last claim of `reasoning` about `choices` speaks for choice `answer` alone."""
    for claim in reversed(claims_of(reasoning, choices)):
        if answer in claim.rejected:
            return False
        if claim.affirmed:
            return claim.affirmed == {answer}
    return False


def claims_of(reasoning: str, choices: Sequence[str]) -> list[Claim]:
    """Read what each sentence of `reasoning` says about `choices`; sentences that name none give an empty claim."""
    text = _VERDICT.sub(r" : \1", reasoning.replace("\u2019", "'"))
    sentences = [sentence.strip() for sentence in _SENTENCE_END.split(text)]
    return [
        _claim(_mark_mentions(sentence, tuple(choices)))
        for sentence in sentences
        if sentence and not sentence.endswith("?") and not _LISTING.search(sentence)
    ]


def _claim(sentence: str) -> Claim:
    affirmed: set[int] = set()
    rejected: set[int] = set()
    for clause in _CLAUSE_END.split(_NO_NEGATION.sub("", sentence)):
        for mention in _MARKED.finditer(clause):
            before, after = clause[: mention.start()], clause[mention.end() :]
            if _NEGATION_BEFORE.search(before) or _NEGATION_AFTER.match(after):
                rejected.add(int(mention[1]))
            elif not _WEIGHING_BEFORE.search(before):
                affirmed.add(int(mention[1]))
    return Claim(affirmed=frozenset(affirmed), rejected=frozenset(rejected))


def _mark_mentions(sentence: str, choices: tuple[str, ...]) -> str:
    """Replace every mention of a choice, by letter or by text, with its mark; longer texts go before shorter ones."""

    def mark_label(match: re.Match[str]) -> str:
        index = resolve_choice(match["named"] or match["capital"] or match["round"] or match["open"], choices)
        return match[0] if index is None else _MARK.format(index)

    def mark_text(match: re.Match[str]) -> str:
        index = resolve_choice(match[0], choices)
        return match[0] if index is None else _MARK.format(index)

    return _text_mentions(choices).sub(mark_text, _LABEL_MENTION.sub(mark_label, sentence))


@lru_cache(maxsize=1024)
def _text_mentions(choices: tuple[str, ...]) -> re.Pattern[str]:
    """Match whole choice texts: "low" not in "slow" or "low-pitched", "C" not in "C#", "1" not in "1.5"."""
    forms = []
    for choice in sorted(choices, key=len, reverse=True):
        text = r"\s+".join(re.escape(word) for word in choice.replace("\u2019", "'").split())
        if len(choice.strip()) == 1 and choice.strip().isalpha():
            # One letter is a word of its own ("a") unless it is written as the choice is and ends its clause.
            text = rf"(?-i:{text})(?=\s*(?:[.,;:!?]|$))"
        forms.append(text)
    return re.compile(rf"(?<![\w#-])(?<!\d\.)(?:{'|'.join(forms)})(?![\w#\u266f\u266d-])(?!\.\d)", re.IGNORECASE)
