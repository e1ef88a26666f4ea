"""Collapse index and accuracy by length, against values worked out by hand; tags of tokens."""

import math

import pytest
import torch

from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.evaluation.grounding.collapse import collapse_index
from nemo_mapo.evaluation.grounding.lengths import length_effect
from nemo_mapo.pos_gate.gate import pos_token_tags
from nemo_mapo.pos_gate.tagger import build_chain_tagger


def test_the_collapse_index_is_what_is_lost_from_the_first_to_the_last_third():
    assert collapse_index(torch.tensor([0.8, 0.4, 0.5, 0.5, 0.2, 0.1])) == pytest.approx(1 - 0.15 / 0.6)
    assert collapse_index(torch.tensor([0.5, 9.0, 0.5])) == pytest.approx(0.0)


def test_a_completion_without_thirds_has_no_collapse_index():
    assert math.isnan(collapse_index(torch.tensor([0.5])))


def test_the_effect_of_length_within_questions_is_free_of_their_difficulty():
    # Hard questions are answered at length and wrongly; within a question, length helps.
    effect = length_effect([[10, 12], [30, 32]], [[1.0, 1.0], [0.0, 1.0]], [[True] * 2] * 2)
    assert effect.pearson is not None and effect.pearson < 0
    # Centred lengths (-1, 1, -1, 1), centred scores (0, 0, -0.5, 0.5): r = 1 / (2 sqrt(0.5)).
    assert effect.within_item == pytest.approx(1 / (2 * math.sqrt(0.5)))


def test_a_correlation_that_is_not_defined_is_none():
    effect = length_effect([[10, 12], [30, 32]], [[1.0, 1.0], [1.0, 1.0]], [[True] * 2] * 2)
    assert effect.pearson is None and effect.within_item is None


def test_completions_of_one_length_share_a_group():
    effect = length_effect([[5, 5, 5, 9]], [[1.0, 0.0, 1.0, 0.0]], [[True] * 4])
    assert [(group.shortest, group.longest, group.completions) for group in effect.bins] == [(5, 5, 3), (9, 9, 1)]
    assert effect.bins[0].accuracy == pytest.approx(2 / 3)


def test_every_token_has_the_tag_of_its_word():
    tokenizer = build_tokenizer()
    ids = tokenizer.encode("<think> the tone seems deep.</think> deep", add_special_tokens=False)
    tags = dict(
        zip(tokenizer.convert_ids_to_tokens(ids), pos_token_tags(ids, tokenizer, build_chain_tagger()), strict=True)
    )
    tagged = {name.strip("\u0120\u2581 "): tag for name, tag in tags.items()}
    assert tagged["the"] == "DET" and tagged["tone"] == "NOUN" and tagged["deep"] == "ADJ"
    assert tagged["<think>"] is None and tagged["."] is None


def test_truncated_completions_do_not_count_for_length():
    # Cut-off ones are the longest and wrong; among finished ones the longer is right.
    effect = length_effect([[4, 6, 20], [5, 9, 20]], [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]], [[True, True, False]] * 2)
    assert effect.within_item is not None and effect.within_item < 0
    # Centred lengths (-1, 1, -2, 2), centred scores (-0.5, 0.5, -0.5, 0.5): r = 3 / sqrt(10 * 1).
    assert effect.within_item_finished == pytest.approx(3 / math.sqrt(10))
    assert effect.truncated == 2


def test_nothing_is_said_about_finished_completions_where_there_are_none():
    effect = length_effect([[8, 8]], [[0.0, 0.0]], [[False, False]])
    assert effect.within_item_finished is None and effect.truncated == 2


def test_a_completion_that_never_listened_early_has_no_finite_collapse_index():
    assert not math.isfinite(collapse_index(torch.tensor([0.0, 0.1, 0.2])))
    assert not math.isfinite(collapse_index(torch.tensor([0.0, 0.1, 0.0])))
