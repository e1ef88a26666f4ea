"""The rule of MMAU's and MMAR's own scripts, for scores that are comparable with published ones."""

import re
from collections.abc import Sequence

_WORD = re.compile(r"\b\w+\b")


def official_string_match(prediction: str, answer: str, choices: Sequence[str]) -> bool:
    """Whether a prediction is right by the words it contains (evaluation.py of both benchmarks).

    Every word of the right choice is in the prediction, and no word that only wrong choices have. So "not a dog" is
    right if "dog" is, and "B" is always wrong: `official_string_match("a dog", "dog", ("dog", "cat"))` is True.
    """
    said, right = _words(prediction), _words(answer)
    wrong = {word for choice in choices if _words(choice) != right for word in _words(choice) - right}
    return bool(said) and right <= said and not said & wrong


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
