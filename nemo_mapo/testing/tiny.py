"""A real audio LLM small enough for a unit test, with a tokenizer and prompts to match."""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from nemo_mapo.config.model import ConvPerceptionConfig, DecoderConfig, ModelConfig
from nemo_mapo.data.tokenizer import ASSISTANT, AUDIO, AUDIO_END, AUDIO_START, END, PAD, THINK_TAGS, USER
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.types import AudioBatch, Example, PromptBatch, Rollouts

SAMPLE_RATE = 16000
UNKNOWN = "<|unknown|>"
CONTROL_TOKENS = (PAD, END, UNKNOWN, USER, ASSISTANT, AUDIO_START, AUDIO, AUDIO_END)
CHOICES = ("deep", "low", "high", "shrill")
_TEXT = "the tone a sweep noise pulse is sounds seems loud quiet then first last which what I hear so answer . , ? : )"
WORDS = (*CHOICES, *_TEXT.split())
SHORTEST_CLIP_SECONDS = 0.32
CLIP_STEP_SECONDS = 0.16
SHORTEST_QUESTION_WORDS = 4
_SHARP_INIT_STD = 0.2
"""Ten times the usual: random logits far enough apart that rounding does not decide an argmax."""


@dataclass(frozen=True, kw_only=True)
class TinyAudioLLM:
    """A model with random weights and what is needed to feed it."""

    config: ModelConfig
    model: AudioLLM
    tokenizer: PreTrainedTokenizerFast

    def token_id(self, token: str) -> int:
        """Id of one of this module's tokens."""
        return self.tokenizer.get_vocab()[token]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, words apart by spaces; the project's special tokens come first."""
    vocabulary = {token: index for index, token in enumerate(CONTROL_TOKENS + THINK_TAGS + WORDS)}
    words = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, AUDIO_START, AUDIO, AUDIO_END],
    )


def tiny_model_config(*, tied: bool = True, num_layers: int = 2, qk_layernorm: bool = True) -> ModelConfig:
    """A decoder of width 32 with grouped queries, and a convolutional encoder."""
    return ModelConfig(
        perception=ConvPerceptionConfig(mel_bins=16, channels=24, downsampling=4),
        decoder=DecoderConfig(
            num_layers=num_layers,
            hidden_size=32,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=8,
            ffn_hidden_size=64,
            max_position_embeddings=128,
            init_method_std=_SHARP_INIT_STD,
            qk_layernorm=qk_layernorm,
            share_embeddings_and_output_weights=tied,
        ),
    )


def tiny_audio_llm(
    *,
    seed: int = 0,
    tied: bool = True,
    num_layers: int = 2,
    qk_layernorm: bool = True,
    dtype: torch.dtype = torch.float32,
) -> TinyAudioLLM:
    """Build the model, the same for the same seed, in training mode; prepares the host and the process groups.

    The global random state is left as it was.
    """
    install_cpu_host()
    initialize_parallel()
    config = tiny_model_config(tied=tied, num_layers=num_layers, qk_layernorm=qk_layernorm)
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AudioLLM(
            config,
            vocab_size=len(tokenizer),
            audio_token_id=tokenizer.get_vocab()[AUDIO],
            sample_rate=SAMPLE_RATE,
            params_dtype=dtype,
        )
    return TinyAudioLLM(config=config, model=model, tokenizer=tokenizer)


def tiny_prompt_batch(
    tiny: TinyAudioLLM,
    *,
    num_prompts: int = 3,
    equal_lengths: bool = False,
    without_audio: tuple[int, ...] = (),
    seed: int = 0,
) -> PromptBatch:
    """Prompts of random words about random noise, the same for the same seed.

    Args:
        tiny: whose tokenizer and encoder decide the ids and the number of placeholders.
        num_prompts: rows.
        equal_lengths: whether all prompts with audio have the same number of tokens; else both grow by row.
        without_audio: rows that have no clip (`audio_row` -1).
        seed: of words and waveforms.
    """
    generator = torch.Generator().manual_seed(seed)
    growth = [0 if equal_lengths else row for row in range(num_prompts)]
    with_audio = [row for row in range(num_prompts) if row not in without_audio]
    seconds = [SHORTEST_CLIP_SECONDS + CLIP_STEP_SECONDS * growth[row] for row in with_audio]
    audio = _noise_clips([round(duration * SAMPLE_RATE) for duration in seconds], generator)
    examples = tuple(_example(row, SHORTEST_QUESTION_WORDS + growth[row], generator) for row in range(num_prompts))
    placeholders = {
        row: tiny.model.num_audio_tokens(int(samples)) for row, samples in zip(with_audio, audio.lengths, strict=True)
    }
    texts = [_prompt_text(example.question, placeholders.get(row, 0)) for row, example in enumerate(examples)]
    encoded = tiny.tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
    return PromptBatch(
        tokens=encoded["input_ids"],
        lengths=encoded["attention_mask"].sum(dim=1),
        audio=audio,
        audio_row=torch.tensor([with_audio.index(row) if row in with_audio else -1 for row in range(num_prompts)]),
        examples=examples,
    )


def tiny_rollouts(tiny: TinyAudioLLM, *, num_prompts: int = 2, group_size: int = 2, seed: int = 0) -> Rollouts:
    """Random completions of 1, 2, 3, ... tokens to `tiny_prompt_batch`, the same for the same seed."""
    prompts = tiny_prompt_batch(tiny, num_prompts=num_prompts, seed=seed)
    rows = num_prompts * group_size
    lengths = torch.arange(1, rows + 1)
    words = torch.randint(
        len(CONTROL_TOKENS), len(tiny.tokenizer), (rows, rows), generator=torch.Generator().manual_seed(seed)
    )
    mask = torch.arange(rows) < lengths[:, None]
    pad_id = tiny.token_id(PAD)
    return Rollouts(
        prompts=prompts,
        group_size=group_size,
        completions=words.masked_fill(~mask, pad_id),
        completion_lengths=lengths,
        finish_reasons=tuple("stop" for _ in range(rows)),
        texts=tuple(tiny.tokenizer.decode(row[:length]) for row, length in zip(words, lengths.tolist(), strict=True)),
        log_probs=torch.zeros(rows, rows),
        sampling_log_probs=torch.zeros(rows, rows),
        weight_version=0,
    )


def _noise_clips(samples: list[int], generator: torch.Generator) -> AudioBatch:
    lengths = torch.tensor(samples, dtype=torch.int64)
    waveforms = torch.randn(len(samples), max(samples, default=0), generator=generator)
    valid = torch.arange(waveforms.shape[1]) < lengths[:, None]
    return AudioBatch(waveforms=waveforms * valid, lengths=lengths)


def _example(row: int, words: int, generator: torch.Generator) -> Example:
    drawn = torch.randint(len(WORDS), (words,), generator=generator).tolist()
    return Example(
        id=f"tiny-{row}",
        question=" ".join(WORDS[index] for index in drawn),
        choices=CHOICES,
        answer=CHOICES[row % len(CHOICES)],
        task="tiny",
    )


def _prompt_text(question: str, placeholders: int) -> str:
    audio = [AUDIO_START, *[AUDIO] * placeholders, AUDIO_END] if placeholders else []
    return " ".join([USER, *audio, question, ASSISTANT])
