"""What a text LLM's tokenizer gets, and how its chat template takes a clip."""

import pytest
from integration.parts_tiny import CHAT, chat_tokenizer

from nemo_mapo.data.audio_tokens import with_audio_tokens
from nemo_mapo.data.prompts import encode_prompt
from nemo_mapo.data.tokenizer import SpecialTokens, load_tokenizer
from nemo_mapo.types import Example, Wording

EXAMPLE = Example(id="1", question="is it low?", choices=("low", "high"), answer="low", task="t")


def test_the_template_stays_the_decoders_with_a_place_for_a_clip(tmp_path):
    plain, grown = chat_tokenizer(), chat_tokenizer()
    new = with_audio_tokens(grown)
    assert grown.convert_ids_to_tokens(new) == ["<|audio_start|>", "<|audio|>", "<|audio_end|>", "<|pad|>"]
    assert new == list(range(len(plain), len(plain) + 4))
    grown.save_pretrained(str(tmp_path))
    again = load_tokenizer(tmp_path)
    special = SpecialTokens.from_tokenizer(again)
    assert again.convert_ids_to_tokens([special.pad_id, special.end_id]) == ["<|pad|>", "<|im_end|>"]
    turns = [{"role": "user", "content": "low or high?"}, {"role": "assistant", "content": "low"}]
    assert again.apply_chat_template(turns, tokenize=False) == plain.apply_chat_template(turns, tokenize=False)
    text = "is it low? choices: low, high."
    with_clip = again.decode(encode_prompt(EXAMPLE, 2, again, Wording()))
    assert with_clip == (
        f"<|im_start|>user\n<|audio_start|><|audio|><|audio|><|audio_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (
        again.decode(encode_prompt(EXAMPLE, 0, again, Wording()))
        == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_base_models_turns_are_laid_out_as_in_the_embedded_run():
    tokenizer = chat_tokenizer(None)
    with_audio_tokens(tokenizer)
    assert SpecialTokens.from_tokenizer(tokenizer).end_id == tokenizer.convert_tokens_to_ids("<|end|>")
    text = tokenizer.decode(encode_prompt(EXAMPLE, 1, tokenizer, Wording()))
    assert text.startswith("<|user|><|audio_start|><|audio|><|audio_end|> is it low?") and text.endswith(
        "<|assistant|>"
    )


def test_a_template_at_whose_end_generation_cannot_stop_is_refused():
    tokenizer = chat_tokenizer(CHAT.replace("<|im_end|>", "END"))
    with pytest.raises(ValueError, match=r"ends an answer with 'END"):
        with_audio_tokens(tokenizer)
