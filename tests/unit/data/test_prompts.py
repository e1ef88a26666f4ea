import pytest
import torch

from nemo_mapo.data.prompts import drop_audio_span, encode_prompt
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.types import Example, Wording

TOKENIZER = build_tokenizer()
SPECIAL = SpecialTokens.from_tokenizer(TOKENIZER)
EXAMPLE = Example(
    id="clip", question="how does the tone sound?", choices=("low", "high", "deep", "shrill"), answer="low", task="t"
)


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows)) + 2
    tokens = torch.tensor([row + [SPECIAL.pad_id] * (width - len(row)) for row in rows])
    return tokens, torch.tensor([len(row) for row in rows])


def test_a_prompt_is_laid_out_as_documented():
    assert TOKENIZER.decode(encode_prompt(EXAMPLE, 3, TOKENIZER, Wording())) == (
        "<|user|><|audio_start|><|audio|><|audio|><|audio|><|audio_end|>"
        " how does the tone sound? choices: low, high, deep, shrill.<|assistant|>"
    )


@pytest.mark.parametrize("count", [1, 2, 25])
def test_a_prompt_holds_as_many_placeholders_as_the_clip_has_tokens(count):
    assert encode_prompt(EXAMPLE, count, TOKENIZER, Wording()).count(SPECIAL.audio_id) == count


def test_a_prompt_without_audio_has_no_markers():
    assert TOKENIZER.decode(encode_prompt(EXAMPLE, 0, TOKENIZER, Wording())) == (
        "<|user|> how does the tone sound? choices: low, high, deep, shrill.<|assistant|>"
    )


def test_dropping_the_span_gives_the_prompt_of_a_text_only_model():
    rows = [encode_prompt(EXAMPLE, count, TOKENIZER, Wording()) for count in (5, 1, 9)]
    text_only = encode_prompt(EXAMPLE, 0, TOKENIZER, Wording())
    tokens, lengths, removed = drop_audio_span(*padded(rows), SPECIAL)
    assert tokens.tolist() == [text_only] * 3
    assert lengths.tolist() == [len(text_only)] * 3
    assert removed.tolist() == [7, 3, 11]


def test_completions_of_different_length_keep_their_tokens_and_are_padded_anew():
    text_only = encode_prompt(EXAMPLE, 0, TOKENIZER, Wording())
    completions = [[9, 8, SPECIAL.end_id], [7], []]
    rows = [encode_prompt(EXAMPLE, n, TOKENIZER, Wording()) + y for n, y in zip((2, 6, 4), completions, strict=True)]
    tokens, lengths, removed = drop_audio_span(*padded(rows), SPECIAL)
    for row, length, completion in zip(tokens.tolist(), lengths.tolist(), completions, strict=True):
        assert row[:length] == text_only + completion
        assert set(row[length:]) <= {SPECIAL.pad_id}
    assert tokens.shape == (3, len(text_only) + 3)
    assert removed.tolist() == [4, 8, 6]


def test_an_audio_token_that_the_policy_sampled_stays_in_its_completion():
    prompt = encode_prompt(EXAMPLE, 2, TOKENIZER, Wording())
    row = [*prompt, 9, SPECIAL.audio_id, 8]
    tokens, lengths = padded([row])
    kept, new_lengths, removed = drop_audio_span(tokens, lengths, SPECIAL, prompt_lengths=torch.tensor([len(prompt)]))
    assert kept[0].tolist()[-3:] == [9, SPECIAL.audio_id, 8]
    assert int(lengths[0] - new_lengths[0]) == int(removed[0]) == 4


def test_lengths_and_not_pad_ids_say_where_a_row_ends():
    tokens = torch.tensor([[SPECIAL.audio_id, SPECIAL.pad_id, 30, SPECIAL.audio_id, 31]])
    kept, lengths, removed = drop_audio_span(tokens, torch.tensor([3]), SPECIAL)
    assert kept.tolist() == [[SPECIAL.pad_id, 30]]
    assert lengths.tolist() == [2] and removed.tolist() == [1]


def test_no_rows_and_rows_without_audio_pass():
    tokens, lengths, removed = drop_audio_span(
        torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), SPECIAL
    )
    assert tokens.shape == (0, 0) and lengths.shape == removed.shape == (0,)
    plain = torch.tensor([[30, 31, 32]])
    kept, lengths, removed = drop_audio_span(plain, torch.tensor([3]), SPECIAL)
    assert torch.equal(kept, plain) and lengths.tolist() == [3] and removed.tolist() == [0]


def test_the_instruction_follows_the_question_with_and_without_the_clip():
    said = Wording(instruction="Think first.")
    for count in (0, 2):
        plain, told = (TOKENIZER.decode(encode_prompt(EXAMPLE, count, TOKENIZER, words)) for words in (Wording(), said))
        assert told == plain.replace("<|assistant|>", "\nThink first.<|assistant|>")


def test_a_system_message_needs_a_chat_template():
    with pytest.raises(ValueError, match=r"data\.prompt\.system='Be brief\.' needs a tokenizer with a chat template"):
        encode_prompt(EXAMPLE, 2, TOKENIZER, Wording(system="Be brief."))
