import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from nemo_mapo.data.tokenizer import AUDIO, END, PAD, SpecialTokens, completion_text, load_tokenizer
from nemo_mapo.embedded.synthetic import SyntheticCorpusConfig, plan_split
from nemo_mapo.embedded.synthetic_text import caption_text, template_texts
from nemo_mapo.embedded.tokenizer import build_tokenizer

TEXT = "<think> i hear a deep tone first, and last a dull noise. is it dull? no. </think> warm"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def test_every_word_of_the_templates_is_one_token_with_its_blank(tokenizer):
    for text in template_texts():
        words = re.sub(r"([,.?:]|</think>)", r" \1", text).split()
        assert len(tokenizer.encode(text)) == len(words), text


def test_it_is_small_and_serves_every_clip_of_the_corpus(tokenizer):
    assert len(tokenizer) < 500
    for clip in plan_split(SyntheticCorpusConfig(train=0, test=40, validation=0), "test"):
        caption = " " + caption_text(clip.events)
        assert tokenizer.decode(tokenizer.encode(caption)) == caption
        assert len(tokenizer.encode(caption)) == len(caption.replace(",", " ,").replace(".", " .").split())


@pytest.mark.parametrize("text", [TEXT, " Zürich\n\t 42% <thin> 雨", "<|audio|> x"])
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_two_processes_build_the_same_tokenizer(tokenizer):
    program = (
        "from nemo_mapo.embedded.tokenizer import build_tokenizer as b; print(hash_(b().backend_tokenizer.to_str()))"
    )
    program = "import hashlib; hash_ = lambda s: hashlib.sha256(s.encode()).hexdigest(); " + program
    root = Path(__file__).parents[3]
    runs = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=root, env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


def test_reasoning_tags_survive_even_where_special_tokens_are_skipped(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == TEXT


def test_a_completion_loses_only_end_and_padding(tokenizer):
    special = SpecialTokens.from_tokenizer(tokenizer)
    ids = [*tokenizer.encode(TEXT), special.audio_id, special.end_id, special.pad_id, special.pad_id]
    assert completion_text(tokenizer, ids) == TEXT + AUDIO


def test_a_saved_tokenizer_is_loaded_again(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert SpecialTokens.from_tokenizer(loaded) == SpecialTokens.from_tokenizer(tokenizer)
    assert (loaded.pad_token, loaded.eos_token, loaded.padding_side) == (PAD, END, "right")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_directory_without_tokenizer_is_refused_by_name(tmp_path, make):
    make(tmp_path / "prompts")
    with pytest.raises(ValueError, match=r"data\.tokenizer='.*prompts'.*tokenizer_config\.json.*Hugging Face"):
        load_tokenizer(tmp_path / "prompts")


def test_missing_special_tokens_are_named(tokenizer):
    stripped = build_tokenizer().backend_tokenizer.to_str().replace(AUDIO, "<|sound|>")
    other = PreTrainedTokenizerFast(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(stripped))
    with pytest.raises(ValueError, match=r"lacks the special tokens \['<\|audio\|>'\]"):
        SpecialTokens.from_tokenizer(other)
