"""The model's door: everything about y_t is read at the position that predicts it, from the first token on."""

from dataclasses import fields, replace

import pytest
import torch

from nemo_mapo.models.layout import (
    PADDED_ROWS,
    MicroBatching,
    audio_of,
    in_row_order,
    left_padded,
    next_tokens,
    objective_inputs,
    shares_prompt,
)
from nemo_mapo.rows import Prompt, Row, ScoredRow, TokenSignals
from nemo_mapo.training.signals import token_signals, token_signals_in_parts
from nemo_mapo.types import Remembered
from support.tiny import tiny_audio_llm, tiny_rows

PAD = 0
LAYOUTS = {
    "padded": PADDED_ROWS,
    "packed": MicroBatching(rows=1, packed_tokens=99),
    "shared": MicroBatching(rows=1, shared_prompts=True),
}


def text_rows(*rows):
    """Rows of (prompt, completion)."""
    return [
        Row(prompt=Prompt(id="text", token_ids=torch.tensor(prompt)), token_ids=torch.tensor(completion))
        for prompt, completion in rows
    ]


def test_a_row_is_prompt_then_completion_without_a_gap():
    tiny = tiny_audio_llm()
    rows = tiny_rows(tiny)
    inputs = PADDED_ROWS.lay_out(rows, tiny.model)
    for tokens, row in zip(inputs.tokens, rows, strict=True):
        assert tokens[: len(row)].tolist() == [*row.prompt.token_ids.tolist(), *row.token_ids.tolist()]
        assert (tokens[len(row) :] == PAD).all()
    assert inputs.audio_row.tolist() == [0, 0, 1, 1]


def test_a_clip_that_several_prompts_are_about_is_there_once_and_prompts_may_have_several():
    first, second = torch.ones(3), torch.ones(2)
    prompts = [
        Prompt(id=name, token_ids=torch.tensor([1]), clips=clips)
        for name, clips in (("a", (first,)), ("b", (second, first)), ("c", ()), ("d", (first,)))
    ]
    audio, audio_row = audio_of(prompts)
    assert audio.lengths.tolist() == [3, 2] and audio.waveforms.tolist() == [[1.0] * 3, [1.0, 1.0, 0.0]]
    assert audio_row.tolist() == [[0, -1], [1, 0], [-1, -1], [0, -1]]
    assert audio_of(prompts[2:])[1].tolist() == [-1, 0], "one clip at most needs one column"


def test_prompts_are_padded_on_the_left_for_generation():
    prompts = [Prompt(id="a", token_ids=torch.tensor([5, 6, 7])), Prompt(id="b", token_ids=torch.tensor([8]))]
    tokens, segment_ids = left_padded(prompts, pad_id=PAD)
    assert tokens.tolist() == [[5, 6, 7], [PAD, PAD, 8]]
    assert segment_ids.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_read_one_position_before_their_token(layout):
    rows = text_rows(([7, 8], [1, 2, 3]), ([7, 8, 9], [4]), ([7, 8, 9], [5, 6]))
    inputs = LAYOUTS[layout].lay_out(rows, tiny_audio_llm().model)
    targets = inputs.by_row(inputs.targets)
    assert [one.tolist() for one in targets] == [[1, 2, 3], [4], [5, 6]]
    read = inputs.tokens if inputs.read_at is None else inputs.tokens[:, inputs.read_at]
    assert [one.tolist() for one in inputs.by_row(read)] == [[8, 1, 2], [9], [9, 5]]
    flat = inputs.tokens.flatten().tolist()
    assert [flat[span.first : span.first + span.tokens] for span in inputs.spans] == [[8, 1, 2], [9], [9, 5]]
    texts = [flat[span.prompt : span.first] for span in inputs.spans]
    assert texts == [[7], [7, 8], [] if layout == "shared" else [7, 8]]


def test_neighbours_share_a_prompt_of_the_same_tokens_and_clips():
    clip = torch.ones(3)
    heard = [Prompt(id=name, token_ids=torch.tensor([1, 2]), clips=(clip,)) for name in ("a", "b")]
    others = [
        replace(heard[0], clips=(clip.clone(),)),
        heard[0].unheard(),
        replace(heard[0], token_ids=torch.arange(3)),
    ]
    rows = [Row(prompt=prompt, token_ids=torch.tensor([3])) for prompt in [*heard, *others, others[-1]]]
    assert shares_prompt(rows) == [False, True, False, False, False, True]


def test_next_tokens_are_the_targets_of_their_positions():
    assert next_tokens(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, 7]]


def test_log_probabilities_and_entropies_match_a_plain_softmax_token_by_token():
    tiny = tiny_audio_llm()
    rows = tiny_rows(tiny)
    inputs = PADDED_ROWS.lay_out(rows, tiny.model)
    distribution = inputs.call(tiny.model, None).logits.log_softmax(-1)
    for number, (row, signals) in enumerate(
        zip(rows, token_signals(tiny.model, rows, head_reduction="max"), strict=True)
    ):
        for t, token in enumerate(row.token_ids):
            predicted = distribution[number, len(row.prompt) + t - 1]
            torch.testing.assert_close(signals.log_probs[t], predicted[token], atol=1e-5, rtol=1e-5)
            entropy = -(predicted.exp() * predicted).sum()
            torch.testing.assert_close(signals.entropy_nats[t], entropy, atol=1e-5, rtol=1e-5)


def test_the_first_completion_token_is_trained():
    tiny = tiny_audio_llm()
    signals = token_signals(tiny.model, tiny_rows(tiny), head_reduction=None)
    torch.stack([one.log_probs[0] for one in signals]).sum().backward()
    assert tiny.model.perception.projection[1].weight.grad.abs().max() > 0


def test_rows_taken_apart_give_what_all_together_give():
    tiny = tiny_audio_llm()
    tiny.model.eval()
    rows = tiny_rows(tiny)
    whole = token_signals(tiny.model, rows, head_reduction="max")
    parts = token_signals_in_parts(tiny.model, rows, head_reduction="max", batching=MicroBatching(rows=3))
    for part, one in zip(parts, whole, strict=True):
        torch.testing.assert_close(part.log_probs, one.log_probs.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(part.audio_mass, one.audio_mass.detach(), atol=1e-5, rtol=0)


def test_values_of_some_rows_each_are_put_together_in_the_order_of_the_rows():
    assert in_row_order([[2, 0], [1]], [["c", "a"], ["b"]]) == ["a", "b", "c"]


def scored(row, old):
    count = len(row.token_ids)
    per_token = {name: torch.arange(count) + 0.5 for name in ("ref_log_probs", "text_ref_entropy_nats")}
    per_token |= {name: torch.arange(count) + 1.0 for name in ("audio_signal", "behaviour_log_probs")}
    return ScoredRow(
        prompt=row.prompt,
        token_ids=row.token_ids,
        **per_token,
        old_log_probs=old,
        pos_gate=torch.ones(count, dtype=torch.bool),
        advantages=torch.tensor(float(count)),
        accuracy_rewards=torch.tensor(1.0),
        finished=torch.tensor(count > 1),
    )


def test_every_signal_that_is_declared_reaches_the_loss_row_by_row():
    rows = [scored(row, row.token_ids.float()) for row in text_rows(([7], [1, 2]), ([7], [3]))]
    now = [TokenSignals(log_probs=torch.ones(count), entropy_nats=torch.ones(count)) for count in (2, 1)]
    inputs = objective_inputs(rows, now, global_sequences=2, global_tokens=3)
    assert inputs.response_mask.tolist() == [[True, True], [True, False]]
    for name in (signal.name for signal in fields(Remembered)):
        batched, values = vars(inputs)[name], [vars(row)[name] for row in rows]
        if values[0] is None:
            assert batched is None
        elif values[0].dim() == 0:
            assert batched.tolist() == [value.item() for value in values], name
        else:
            assert batched.tolist() == [values[0].tolist(), [values[1].item(), 0]], name


def test_the_policy_itself_is_old_for_rows_that_no_update_came_before():
    rows = [scored(row, None) for row in text_rows(([7], [1, 2]), ([7], [3]))]
    log_probs = [torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-3.0])]
    now = [TokenSignals(log_probs=values, entropy_nats=values.detach()) for values in log_probs]
    inputs = objective_inputs(rows, now, global_sequences=2, global_tokens=3)
    assert inputs.old_log_probs.tolist() == [[-1.0, -2.0], [-3.0, 0.0]] and not inputs.old_log_probs.requires_grad
    with pytest.raises(AssertionError, match="known of all rows of a micro-batch or of none"):
        objective_inputs([rows[0], scored(rows[1], log_probs[1])], now, global_sequences=2, global_tokens=3)
