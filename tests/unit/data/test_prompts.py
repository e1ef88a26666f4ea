import pytest
import torch

from nemo_mapo.data.prompts import encode_prompt, without_audio
from nemo_mapo.data.sequences import drop_audio, token_batch
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.rows import Prompt, Row
from nemo_mapo.types import Example, TokenBatch, Wording

TOKENIZER = build_tokenizer()
SPECIAL = SpecialTokens.from_tokenizer(TOKENIZER)
EXAMPLE = Example(
    id="clip", question="how does the tone sound?", choices=("low", "high", "deep", "shrill"), answer="low", task="t"
)


def dropped(prompts: list[list[int]], completions: list[list[int]]) -> TokenBatch:
    """Rows of these prompts and completions, without the audio of the prompts."""
    rows = [
        Row(prompt=Prompt(id="clip", token_ids=torch.tensor(prompt)), token_ids=torch.tensor(ids, dtype=torch.int64))
        for prompt, ids in zip(prompts, completions, strict=True)
    ]
    return drop_audio(token_batch(rows, pad_id=SPECIAL.pad_id), SPECIAL)


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


@pytest.mark.parametrize("count", [5, 1, 9])
def test_dropping_the_span_gives_the_prompt_of_a_text_only_model(count):
    heard = Prompt(id="clip", token_ids=torch.tensor(encode_prompt(EXAMPLE, count, TOKENIZER, Wording())))
    assert without_audio(heard, SPECIAL).token_ids.tolist() == encode_prompt(EXAMPLE, 0, TOKENIZER, Wording())


def test_completions_of_different_length_keep_their_tokens_and_are_padded_again():
    text_only = encode_prompt(EXAMPLE, 0, TOKENIZER, Wording())
    completions = [[9, 8, SPECIAL.end_id], [7], []]
    rows = dropped([encode_prompt(EXAMPLE, count, TOKENIZER, Wording()) for count in (2, 6, 4)], completions)
    assert rows.prompt_lengths.tolist() == [len(text_only)] * 3
    for row, completion in zip(rows.tokens.tolist(), completions, strict=True):
        length = len(text_only) + len(completion)
        assert row[:length] == text_only + completion
        assert set(row[length:]) <= {SPECIAL.pad_id}
    assert rows.tokens.shape == (3, len(text_only) + 3)


def test_an_audio_token_that_the_policy_sampled_stays_in_its_completion():
    rows = dropped([encode_prompt(EXAMPLE, 2, TOKENIZER, Wording())], [[9, SPECIAL.audio_id, 8]])
    assert rows.tokens[0].tolist()[-3:] == [9, SPECIAL.audio_id, 8]
    assert rows.completion_lengths.tolist() == [3]


def test_lengths_and_not_pad_ids_say_where_a_row_ends():
    rows = dropped([[SPECIAL.audio_id, SPECIAL.pad_id, 30], [30, 31, 32]], [[31], [33, 34]])
    assert rows.tokens.tolist() == [[SPECIAL.pad_id, 30, 31, SPECIAL.pad_id, SPECIAL.pad_id], [30, 31, 32, 33, 34]]
    assert rows.prompt_lengths.tolist() == [2, 3]


def test_the_instruction_follows_the_question_with_and_without_the_clip():
    said = Wording(instruction="Think first.")
    for count in (0, 2):
        plain, told = (TOKENIZER.decode(encode_prompt(EXAMPLE, count, TOKENIZER, words)) for words in (Wording(), said))
        assert told == plain.replace("<|assistant|>", "\nThink first.<|assistant|>")


def test_a_system_message_needs_a_chat_template():
    with pytest.raises(ValueError, match=r"data\.prompt\.system='Be brief\.' needs a tokenizer with a chat template"):
        encode_prompt(EXAMPLE, 2, TOKENIZER, Wording(system="Be brief."))
