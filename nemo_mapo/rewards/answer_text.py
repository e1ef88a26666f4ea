"""Typography and phrases (in six languages) that may surround an answer without changing it."""

import re
import unicodedata

_KEPT_APART = ("<super>", "<sub>", "<fraction>")
"""Compatibility forms that would change an answer: 5² is not 52."""
_STRAIGHT = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032", "'"),
        **dict.fromkeys(
            "\u201c\u201d\u201e\u201f\u2033\u300c\u300d\u300e\u300f\u00ab\u00bb\u2039\u203a\u3008\u3009\u300a\u300b",
            '"',
        ),
        **dict.fromkeys("\u3010\u3014", "["),
        **dict.fromkeys("\u3011\u3015", "]"),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        **dict.fromkeys("\u3002\u0964\u06d4", "."),
        **dict.fromkeys("\u3001\u060c", ","),
        "\u061f": "?",
        "\u266f": "#",
        "\u266d": "b",
    }
)
_END_OF_TURN = re.compile(r"(?:\s*(?:<\|[\w-]+\|>|</s>|<eos>|<end_of_turn>|<end_of_utterance>))+\s*$")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf|textbf|textit|mathit)\s*\{([^{}]*)\}")
_EMPHASIS = re.compile(r"\*\*|__|(?<!\w)\*(?=\S)|(?<=\S)\*(?!\w)|`|\$")

FINAL_MARKS = ".,;:!?"
WRAPPERS = {'"': '"', "'": "'", "(": ")", "[": "]", "{": "}"}

_ADJECTIVE = r"(?:(?:final|correct|right|best|most\s+likely)\s+)*"
_STATEMENTS = (
    rf"{_ADJECTIVE}(?:answer|choice|option)(?:\s+(?:is|would\s+be|should\s+be|must\s+be)\b\s*:?|\s*[:=]|\s+->?(?=\s))",
    r"\bI\s*(?:'d|'ll|will|would)?\s*(?:choose|pick|select|go\s+with|say)\b:?",
    r"(?:答案|选项|選項|正解|答え|回答|解答|選択肢)\s*(?:应该是|應該是|应为|是|为|為|は|:)\s*:?",
    r"(?:我|应该|應該|故|所以|因此)?(?:选择|選擇|选|選)(?!项|項|択)\s*:?",
    r"(?:Antwort|Lösung|Option)(?:\s+(?:ist|lautet|wäre)\b\s*:?|\s*:)",
    r"\bist\s+(?:die|meine)\s+Antwort\b",
    r"(?:respuesta|opción)(?:\s+(?:correcta|final))?(?:\s+(?:es|sería)\b\s*:?|\s*:)",
    r"(?:réponse|option)(?:\s+(?:correcte|finale))?(?:\s+est\b\s*:?|\s*:)",
)
STATEMENT = re.compile("|".join(rf"(?:{one})" for one in _STATEMENTS), re.IGNORECASE)
"""Words after which an answer is stated."""

OPENING = re.compile(
    r"(?:(?:so|thus|hence|therefore|also|por\s+lo\s+tanto|因此|所以|したがって)\b,?\s*)?"
    r"(?:I\s+(?:think|believe|guess)(?:\s+that)?\s+)?"
    r"(?:(?:(?:it|that|this)\s*(?:is|'s)|definitely|clearly|es\s+ist|es\s+la|c'est)\s*:?\s+|(?:应该|應該)?是\s*)?",
    re.IGNORECASE,
)
"""Words that may open an answer but state nothing themselves."""

EXCLUSION = re.compile(r"not\s+(?!only\b|just\b)[^.;\n]{1,60}?\s+but\s+", re.IGNORECASE)
"""Before an answer: negates it."""

DENIAL = re.compile(
    r"n't\b|\b(?:not|never|neither|nor|cannot|wrong|incorrect|false|if|whether|unless|doubt|unlikely|except|which|what)\b"
    r"|\b(?:nicht|kein\w*|falsch\w*|weder|ob|wenn)\b|\b(?:no|incorrect[ao]|fals[ao]|si)\b(?!\s*,)"
    r"|\b(?:pas|fauss?e?)\b|不|非|错|錯|違|误|誤|ない|なければ|如果|若",
    re.IGNORECASE,
)
"""Before a statement in its clause: the statement then means the opposite, or nothing."""

CLAUSE_END = re.compile(r"[.!?;:\n]")

EXPLANATION = re.compile(
    r"[\s,;:.(-]*(?:\b(?:not\s+(?!sure|certain)|rather\s+than|instead\s+of)|\b(?:because|since|as|due\s+to|given\s+that|given\s+the|for\s+the\s+reason|based\s+on|weil|denn|da"
    r"|porque|ya\s+que|puesto\s+que|parce\s+qu['e]|car|puisque)\b|因为|因為|由于|由於|なぜなら|理由)",
    re.IGNORECASE,
)
"""Begins a reason: what follows explains the answer."""

CONFIRMATION = re.compile(
    r"\s*,?\s*(?:(?:is|seems|would\s+be)\s+(?:the\s+)?(?:(?:correct|right|best|final|most\s+likely)\s*)+(?:answer|choice|option)?"
    r"|is\s+the\s+answer|ist\s+(?:richtig|korrekt|die\s+(?:richtige\s+)?antwort)|es\s+(?:la\s+(?:respuesta\s+|opción\s+)?)?correcta"
    r"|est\s+(?:la\s+(?:bonne\s+)?réponse|correcte?)|(?:が|は)?\s*(?:正解|正しい)?\s*(?:です|だ|である|でした)"
    r"|が(?:正解|正しい)|是(?:正确|正確|对|對)的?(?:答案|选项|選項)?|(?:正确|正確))\s*",
    re.IGNORECASE,
)
"""May follow an answer."""

RETRACTION = re.compile(
    r"\b(?:wait|actually|sorry|correction|instead|or|oder|moment|perdón|o\s+bien)\b|或|不对|不對|いや|または",
    re.IGNORECASE,
)
"""In the text after an answer: the answer is then not final."""


def fold(text: str) -> str:
    """The text with one form per character: compatibility forms, quotes, dashes and marks unified, nothing invisible.

    Case and line breaks stay. `fold("「Ｂ」。")` is `'"B".'`.
    """
    canonical = unicodedata.normalize("NFC", text)
    plain = "".join(
        character
        if unicodedata.decomposition(character).startswith(_KEPT_APART)
        else unicodedata.normalize("NFKC", character)
        for character in canonical
        if unicodedata.category(character) != "Cf"
    )
    return unicodedata.normalize("NFC", plain).translate(_STRAIGHT)


def plain_answer(text: str) -> str:
    """Fold a text and remove the markup of an answer: end-of-turn tokens, emphasis, `\\boxed{}` (the last one)."""
    bare = fold(_END_OF_TURN.sub("", text))
    if boxes := _BOXED.findall(bare):
        bare = boxes[-1]
    bare = _EMPHASIS.sub("", _TEXT_COMMAND.sub(r"\1", bare))
    return unwrap(bare.strip())


def unwrap(text: str) -> str:
    """Remove wrappers around a whole text; round and square brackets around a letter stay, because they mark it."""
    text = text.lstrip("#\u00a1\u00bf ")
    while len(text) > 2 and (closing := WRAPPERS.get(text[0])):
        ended = text.rstrip(FINAL_MARKS)
        inner = ended[1:-1]
        if not ended.endswith(closing) or {text[0], closing} & set(inner) or (len(inner) == 1 and text[0] in "(["):
            return text
        text = inner.strip()
    return text
