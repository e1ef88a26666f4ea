"""Where completions divide, which tokens an intervention makes deaf, and what the choices' completions are worth."""

import pytest
import torch

from nemo_mapo.evaluation.grounding.causal import (
    INTERVENTIONS,
    NEVER,
    BeliefRows,
    Parts,
    after_text,
    belief_parts,
    thirds,
    truth_probabilities,
)
from nemo_mapo.models.layout import PADDED_ROWS, MicroBatching
from nemo_mapo.rows import Row
from support.tiny import TinyAudioLLM, tiny_audio_llm, tiny_prompts


@pytest.fixture(scope="module")
def tiny() -> TinyAudioLLM:
    return tiny_audio_llm()


@pytest.mark.parametrize("length", range(1, 14))
def test_thirds_are_those_of_the_collapse_index(length: int) -> None:
    parts = thirds([length])
    number = (2 * torch.arange(length) + 1) * 3 // (2 * length)
    assert int(parts.early_end) == int((number == 0).sum())
    assert int(parts.late_from) == length - int((number == 2).sum())


def test_late_is_what_follows_a_text_and_nothing_without_it(tiny: TinyAudioLLM) -> None:
    texts = ["I hear a tone . so deep .", "I hear a tone"]
    parts = after_text([tiny.tokenizer.encode(text) for text in texts], tiny.tokenizer, ".")
    assert parts.late_from.tolist() == [5, 4] and parts.early_end.tolist() == [5, 4]


def test_interventions_make_the_tokens_deaf_that_they_name() -> None:
    parts = Parts(early_end=torch.tensor([2]), late_from=torch.tensor([4]))
    deaf = {name: parts.deaf(name, (1,)) for name in INTERVENTIONS}
    numbers = torch.arange(6)[None]
    found = {
        name: one.includes(torch.zeros(1, 1, dtype=torch.int64), numbers)[0].tolist() for name, one in deaf.items()
    }
    assert found == {
        "deaf_late": [False] * 4 + [True] * 2,
        "deaf_early": [True] * 2 + [False] * 4,
        "deaf_completion": [True] * 6,
        "deaf_target_layers": [True] * 6,
        "only_late": [True] * 4 + [False] * 2,
    }
    assert [name for name, one in deaf.items() if one.layers] == ["deaf_target_layers"]
    assert [name for name, one in deaf.items() if one.prompt_text] == ["only_late"]
    assert int(deaf["deaf_late"].end) == NEVER


def test_the_truth_is_worth_its_share_of_the_choices_and_what_all_say_cancels(tiny: TinyAudioLLM) -> None:
    prompts = tiny_prompts(tiny, num_prompts=2)
    same = tiny.tokenizer.encode("I hear a")
    words = [tiny.token_id(word) for word in ("deep", "low")]
    rows = BeliefRows(completions=[[*same, word] for word in words], question=[1, 1], truth=[False, True])
    found = truth_probabilities(tiny.model, prompts, rows, batching=MicroBatching(rows=2))
    alone = PADDED_ROWS.lay_out([Row(prompt=prompts[1], token_ids=torch.tensor(same))], tiny.model)
    with torch.no_grad():
        logits = tiny.model(alone.tokens, alone.audio, alone.audio_row).logits
    expected = logits[0, -1, words].double().softmax(0)[1]
    assert found[1] == pytest.approx(float(expected), abs=1e-5) and found[0].isnan()


def test_completions_of_a_question_divide_as_that_of_its_truth_does(tiny: TinyAudioLLM) -> None:
    long, short = tiny.tokenizer.encode("I hear a tone . so deep ."), tiny.tokenizer.encode("I . so low .")
    rows = BeliefRows(completions=[long, short], question=[0, 0], truth=[False, True])
    assert belief_parts(rows, tiny.tokenizer, ".").late_from.tolist() == [2, 2]


@pytest.mark.parametrize("late_after", [None, "."])
def test_without_comparable_completions_no_question_has_a_probability(tiny: TinyAudioLLM, late_after) -> None:
    rows = BeliefRows(completions=[], question=[], truth=[])
    assert len(belief_parts(rows, tiny.tokenizer, late_after).late_from) == 0
    prompts = tiny_prompts(tiny, num_prompts=2)
    assert truth_probabilities(tiny.model, prompts, rows, batching=MicroBatching(rows=2)).isnan().all()
