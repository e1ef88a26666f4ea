"""Every rule of MMAU-Pro's instruction-following part, on responses whose verdict is plain to see."""

import pytest
from nltk.tokenize.punkt import PunktSentenceTokenizer

from nemo_mapo.evaluation.benchmarks import instructions
from nemo_mapo.evaluation.benchmarks.instructions import RULES, follows_instruction, needs_sentences

QUESTION = "Describe the sound."

CASES = [
    ("Include Keywords", {"keywords": "dog, Rain"}, "A DOG in the rain", "A dog in the sun"),
    ("Keyword Frequency", {"keyword": "dog", "N": 2}, "Dog, a dog and dogs", "dog dog dog"),
    ("Forbidden Words", {"forbidden_words": "dog, rain"}, "A cat", "It is Raining"),
    ("Number Paragraphs", {"N": 2}, "one *** two", "one *** two *** three"),
    ("Number Paragraphs", {"N": 2}, "*** one *** two", "one\n\ntwo"),
    ("Number Words (at least)", {"N": 3}, "one two three", "one two"),
    ("Number Words (at most)", {"N": 3}, "one two three", "one two three four"),
    ("Number Words (range)", {"N1": 2, "N2": 3}, "one two", "one"),
    ("Postscript", {"postscript_marker": "P.P.S."}, "Bye. p.p.s: more", "Bye. P.S. more"),
    ("Number Placeholder", {"N": 2}, "[name] at [place] in [year]", "[name]"),
    ("Number Bullets", {"N": 2}, "* one\n  * two", "* one\n* two\n* three"),
    ("Title", {}, "<<Rain>> it falls", "Rain"),
    ("Minimum Number Highlighted Section", {"N": 2}, "*one* and *two* and *three*", "*one*"),
    ("Multiple Sections", {"N": 2, "section_splitter": "SECTION"}, "SECTION one SECTION two", "SECTION one"),
    ("Repeat Prompt", {}, "  describe the sound. It rains.", "It rains. Describe the sound."),
    ("Two Responses", {}, "one ****** two", "one ****** One"),
    ("Two Responses", {}, "one******two", "one"),
    ("All Uppercase", {}, "IT RAINS, 3 TIMES", "IT Rains"),
    ("All Lowercase", {}, "it rains", "It rains"),
    ("All-capital Words (at least)", {"N": 2}, "IT RAINS now", "IT rains"),
    ("All-capital Words (at most)", {"N": 1}, "IT rains", "IT RAINS"),
    ("All-capital Words (range)", {"N1": 1, "N2": 2}, "IT RAINS now", "it rains"),
    ("Start Checker", {"start_phrase": "Well, I hear"}, "well I HEAR rain", "I hear well"),
    ("End Checker", {"end_phrase": "That is all!"}, "Rain. that is all", "That is all. Rain"),
    ("Quotation", {}, ' "It rains" ', '"It rains'),
    ("No Commas", {}, "rain and wind", "rain, wind"),
]
SENTENCES = [
    ("Number Sentences (at least)", {"N": 2}, "It rains. It pours.", "It rains."),
    ("Number Sentences (at most)", {"N": 1}, "It rains.", "It rains. It pours."),
    ("Number Sentences (range)", {"N1": 2, "N2": 2}, "It rains. It pours.", "It rains. It pours. It ends."),
]


@pytest.mark.parametrize(("rule", "arguments", "good", "bad"), CASES)
def test_a_response_follows_a_rule_or_does_not(rule, arguments, good, bad):
    assert follows_instruction(good, rule, arguments, QUESTION)
    assert not follows_instruction(bad, rule, arguments, QUESTION)


@pytest.mark.parametrize(("rule", "arguments", "good", "bad"), SENTENCES)
def test_sentences_are_counted_by_punkt(monkeypatch, rule, arguments, good, bad):
    # The untrained model stands in for NLTK's English one, whose data may not be on this machine.
    monkeypatch.setattr("nltk.tokenize.sent_tokenize", PunktSentenceTokenizer().tokenize)
    assert needs_sentences(rule)
    assert follows_instruction(good, rule, arguments, QUESTION)
    assert not follows_instruction(bad, rule, arguments, QUESTION)


def test_every_rule_is_tried_here():
    assert {rule for rule, *_ in CASES + SENTENCES} == set(RULES)


def test_sentences_cannot_be_counted_without_data(monkeypatch):
    def no_data(text):
        raise LookupError("punkt_tab")

    monkeypatch.setattr("nltk.tokenize.sent_tokenize", no_data)
    with pytest.raises(ValueError, match=r"nltk\.downloader punkt_tab"):
        instructions.count_sentences("One. Two.")
