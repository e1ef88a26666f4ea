"""Qwen's prompts: the tokens that its own processor would give, and the same without any trace of the clip."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import Qwen3OmniMoeProcessor

from nemo_mapo.data.prompts import encode_prompt, shown_prompt, without_audio
from nemo_mapo.data.tokenizer import SPECIAL_TOKENS, SpecialTokens
from nemo_mapo.rows import Prompt
from nemo_mapo.types import Example, Wording
from support.tiny import tiny_tokenizer

PAD, END = "<|endoftext|>", "<|im_end|>"
SPANS = [(start, audio, end) for name, (_, _, audio, start, end) in SPECIAL_TOKENS.items() if name.startswith("qwen")]
EXAMPLE = Example(id="cut-7", question="what is loud ?", choices=("deep", "high"), answer="deep", task="t")
WORDS = [
    "<|im_start|>",
    "user",
    "assistant",
    "what",
    "is",
    "loud",
    "?",
    "choices:",
    "deep,",
    "high.",
    "system",
    "be",
    "brief",
]
PROCESSORS = dict(zip(SPANS, (Qwen2_5OmniProcessor, Qwen3OmniMoeProcessor), strict=True))


def template(span: tuple[str, str, str]) -> str:
    """Turns as the models lay them out, with blanks around tokens for this test's tokenizer."""
    return (
        "<|im_start|> system be brief <|im_end|> "
        "{% for message in messages %}<|im_start|> {{ message.role }} "
        "{% for part in message.content %}{% if part.type == 'audio' %}" + " ".join(span) + " "
        "{% else %}{{ part.text }} {% endif %}{% endfor %}<|im_end|> {% endfor %}"
        "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
    )


@pytest.fixture(params=SPANS, ids=["qwen2.5", "qwen3"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    tokens = [PAD, END, *request.param, *WORDS, "<unk>"]
    words = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, eos_token=END, additional_special_tokens=[*request.param]
    )
    made.chat_template = template(request.param)
    return made


def span_of(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str, str]:
    return next(span for span in SPANS if span[1] in tokenizer.get_vocab())


def processors_tokens(tokenizer: PreTrainedTokenizerFast, counts: list[int]) -> list[int]:
    """What the model's own processor makes of the same turn: its template, its expansion of the placeholder."""
    span = span_of(tokenizer)
    processor = PROCESSORS[span]
    if not hasattr(processor, "replace_multimodal_special_tokens"):
        pytest.skip("the processors of transformers 5 expand placeholders elsewhere")

    class AudioOnly(processor):
        """Without images and video, whose processors want torchvision."""

        def __init__(self) -> None:
            self.audio_token, self.image_token, self.video_token = span[1], "<|IMAGE|>", "<|VIDEO|>"
            self.image_processor = self.video_processor = type("Merge", (), {"merge_size": 2})()

    clips = [{"type": "audio", "audio": "clip.wav"}] * len(counts)
    content = [*clips, {"type": "text", "text": "what is loud ? choices: deep, high."}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    (expanded,) = AudioOnly().replace_multimodal_special_tokens(
        [text], iter(np.array(counts)), iter(()), iter(()), iter(()), False, 25, 2.0
    )
    # The run of placeholders has no blanks between, which this tokenizer needs.
    return tokenizer.encode(expanded.replace(span[1], f" {span[1]} "), add_special_tokens=False)


def test_a_prompt_is_what_the_models_processor_makes_of_it(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_prompt(EXAMPLE, 5, tokenizer, Wording())
    assert ids == processors_tokens(tokenizer, [5])
    assert ids.count(SpecialTokens.from_tokenizer(tokenizer).audio_id) == 5
    assert encode_prompt(EXAMPLE, [5, 2], tokenizer, Wording()) == processors_tokens(tokenizer, [5, 2])


def test_dropping_the_span_leaves_the_prompt_of_the_text_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    heard = Prompt(id="one", token_ids=torch.tensor(encode_prompt(EXAMPLE, 4, tokenizer, Wording())))
    alone = encode_prompt(EXAMPLE, 0, tokenizer, Wording())
    assert without_audio(heard, SpecialTokens.from_tokenizer(tokenizer)).token_ids.tolist() == alone
    assert "what is loud ? choices: deep, high." in tokenizer.decode(alone)


def test_system_and_instruction_are_where_the_chat_template_puts_them(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_prompt(EXAMPLE, 1, tokenizer, Wording(system="is loud", instruction="what user ?"))
    span = " ".join(span_of(tokenizer))
    assert tokenizer.decode(ids) == (
        "<|im_start|> system be brief <|im_end|> <|im_start|> system is loud <|im_end|> "
        f"<|im_start|> user {span} what is loud ? choices: deep, high. what user ? <|im_end|> <|im_start|> assistant"
    )


def test_a_prompt_is_shown_with_its_special_tokens_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = shown_prompt(encode_prompt(EXAMPLE, 2, tokenizer, Wording()), tokenizer)
    start, audio, end = span_of(tokenizer)
    assert [text for text, special in pieces if special] == [END, start, audio, audio, end, END]
    assert pieces[-1] == ("<|im_start|> assistant", False)


def test_a_tokenizer_without_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"neither a chat template .* give the `tokenizer` directory"):
        encode_prompt(EXAMPLE, 2, tokenizer, Wording())


def test_other_tokenizers_are_distinguished(tokenizer: PreTrainedTokenizerFast) -> None:
    ours, qwens = SpecialTokens.from_tokenizer(tiny_tokenizer()), SpecialTokens.from_tokenizer(tokenizer)
    assert tiny_tokenizer().convert_ids_to_tokens(ours.end_id) == "<|end|>"
    assert tokenizer.convert_ids_to_tokens(qwens.end_id) == END
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")), unk_token="<unk>"
    )
    with pytest.raises(ValueError, match=r"lacks the special tokens .*Qwen Omni"):
        SpecialTokens.from_tokenizer(plain)
