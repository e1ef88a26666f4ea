"""A real audio LLM small enough for a unit test, with a tokenizer and prompts to match."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nemo_mapo.config.model import ConvPerceptionConfig, DecoderConfig, ModelConfig
from nemo_mapo.data.tokenizer import ASSISTANT, AUDIO, AUDIO_END, AUDIO_START, END, PAD, THINK_TAGS, USER
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import PADDED_ROWS, ModelInputs
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.rows import Completion, Group, Problem, Prompt, Row, training_rows
from nemo_mapo.types import Example

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
        model = random_policy(config, tokenizer, seed=seed, dtype=dtype)
    return TinyAudioLLM(config=config, model=model, tokenizer=tokenizer)


def random_policy(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int, dtype: torch.dtype
) -> AudioLLM:
    """An audio LLM of this config with weights drawn after `torch.manual_seed(seed)`."""
    torch.manual_seed(seed)
    return AudioLLM(
        config,
        vocab_size=len(tokenizer),
        audio_token_id=tokenizer.get_vocab()[AUDIO],
        sample_rate=SAMPLE_RATE,
        params_dtype=dtype,
    )


def tiny_problems(
    tiny: TinyAudioLLM,
    *,
    num_prompts: int = 3,
    equal_lengths: bool = False,
    without_audio: tuple[int, ...] = (),
    seed: int = 0,
) -> list[Problem]:
    """Prompts of random words about random noise, the same for the same seed.

    Args:
        tiny: whose tokenizer and encoder decide the ids and the number of placeholders.
        num_prompts: how many.
        equal_lengths: whether all prompts with audio have the same number of tokens; else both grow by prompt.
        without_audio: numbers of the prompts that have no clip.
        seed: of words and waveforms.
    """
    generator = torch.Generator().manual_seed(seed)
    growth = [0 if equal_lengths else row for row in range(num_prompts)]
    with_audio = [row for row in range(num_prompts) if row not in without_audio]
    seconds = [SHORTEST_CLIP_SECONDS + CLIP_STEP_SECONDS * growth[row] for row in with_audio]
    noise = _noise_clips([round(duration * SAMPLE_RATE) for duration in seconds], generator)
    clips = {row: (clip,) for row, clip in zip(with_audio, noise, strict=True)}
    examples = [_example(row, SHORTEST_QUESTION_WORDS + growth[row], generator) for row in range(num_prompts)]
    return [_problem(tiny, example, clips.get(row, ())) for row, example in enumerate(examples)]


def tiny_prompts(tiny: TinyAudioLLM, **settings: Any) -> list[Prompt]:
    """The prompts of `tiny_problems`."""
    return [problem.prompt for problem in tiny_problems(tiny, **settings)]


def tiny_batch(tiny: TinyAudioLLM, **settings: Any) -> ModelInputs:
    """The prompts of `tiny_problems` laid out for the model, right-padded, with completions of no token."""
    nothing = torch.zeros(0, dtype=torch.int64)
    rows = [Row(prompt=prompt, token_ids=nothing) for prompt in tiny_prompts(tiny, **settings)]
    return PADDED_ROWS.lay_out(rows, tiny.model)


def tiny_rows(tiny: TinyAudioLLM, **settings: Any) -> list[Row]:
    """The rows of `tiny_groups`."""
    return training_rows(tiny_groups(tiny, **settings))


def tiny_groups(tiny: TinyAudioLLM, *, num_prompts: int = 2, group_size: int = 2, seed: int = 0) -> list[Group]:
    """Random completions of 1, 2, 3, ... tokens to `tiny_problems`, the same for the same seed."""
    rows = num_prompts * group_size
    words = torch.randint(
        len(CONTROL_TOKENS), len(tiny.tokenizer), (rows, rows), generator=torch.Generator().manual_seed(seed)
    )
    completions = [tiny_completion(tiny, words[row, : row + 1]) for row in range(rows)]
    problems = tiny_problems(tiny, num_prompts=num_prompts, seed=seed)
    return [
        problem.answered(completions[number * group_size : (number + 1) * group_size])
        for number, problem in enumerate(problems)
    ]


def with_texts(groups: Sequence[Group], texts: Sequence[str]) -> list[Group]:
    """The groups, saying something else."""
    said = iter(texts)
    return [
        replace(group, completions=tuple(replace(one, text=next(said)) for one in group.completions))
        for group in groups
    ]


def tiny_completion(tiny: TinyAudioLLM, token_ids: Int[Tensor, " time"]) -> Completion:
    """A completion of these tokens that ended by itself; its log-probs are all 0."""
    return Completion(
        token_ids=token_ids,
        sampling_log_probs=torch.zeros(len(token_ids)),
        log_probs=torch.zeros(len(token_ids)),
        stopped=True,
        text=str(tiny.tokenizer.decode(token_ids)),
        weight_version=0,
    )


def _problem(tiny: TinyAudioLLM, example: Example, clips: tuple[Tensor, ...]) -> Problem:
    placeholders = sum(tiny.model.num_audio_tokens(len(clip)) for clip in clips)
    token_ids = tiny.tokenizer.encode(_prompt_text(example.question, placeholders), add_special_tokens=False)
    return Problem(prompt=Prompt(id=example.id, token_ids=torch.tensor(token_ids), clips=clips), example=example)


def _noise_clips(samples: list[int], generator: torch.Generator) -> list[Tensor]:
    waveforms = torch.randn(len(samples), max(samples, default=0), generator=generator)
    return [waveform[:length] for waveform, length in zip(waveforms, samples, strict=True)]


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
