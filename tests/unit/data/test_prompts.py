import pytest
import torch

from nemo_mapo.data.prompts import encode_prompt, without_audio
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.rows import Prompt
from nemo_mapo.types import Example, Wording

TOKENIZER = build_tokenizer()
SPECIAL = SpecialTokens.from_tokenizer(TOKENIZER)
EXAMPLE = Example(
    id="clip", question="how does the tone sound?", choices=("low", "high", "deep", "shrill"), answer="low", task="t"
)


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


def test_the_instruction_follows_the_question_with_and_without_the_clip():
    said = Wording(instruction="Think first.")
    for count in (0, 2):
        plain, told = (TOKENIZER.decode(encode_prompt(EXAMPLE, count, TOKENIZER, words)) for words in (Wording(), said))
        assert told == plain.replace("<|assistant|>", "\nThink first.<|assistant|>")


def test_a_system_message_needs_a_chat_template():
    with pytest.raises(ValueError, match=r"data\.prompt\.system='Be brief\.' needs a tokenizer with a chat template"):
        encode_prompt(EXAMPLE, 2, TOKENIZER, Wording(system="Be brief."))
