"""What /v1/chat/completions takes and gives: OpenAI's fields, and `nemo_mapo` for what training needs beyond them."""

import base64
import binascii
import io
import math
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import soundfile
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.data.prompts import encode_prompt
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.rollout.server.engine import Generated, Job, WeightId
from nemo_mapo.types import Example, Wording

_SEED_BITS = 62
"""Room above a drawn seed for the other completions of the request."""
DEFAULT_MAX_TOKENS = 512

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class AudioData(_Strict):
    """A clip, base64."""

    data: str
    format: Literal["wav", "flac"]


class AudioPart(_Strict):
    """A clip of a message."""

    type: Literal["input_audio"]
    input_audio: AudioData


class Message(_Strict):
    """A turn of the user; there is one, as in training."""

    role: Literal["user"]
    content: str | tuple[Annotated[TextPart | AudioPart, Field(discriminator="type")], ...]


class Extension(_Strict):
    """`nemo_mapo`: token ids both ways, a seed a completion, and the weights that are asked for."""

    prompt_token_ids: tuple[int, ...] | None = None
    """Takes the place of the message's text; audio placeholders are in it."""
    seeds: tuple[Seed, ...] | None = None
    weight_version: int | None = None
    weight_digest: str | None = None
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0


class ChatRequest(_Strict):
    """Fields of OpenAI's that are served; all others are refused."""

    model: str
    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=1)]
    n: Annotated[int, Field(ge=1)] = 1
    seed: Seed | None = None
    """Completion i of n is drawn with seed + i."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Literal[0] | None = None
    stream: Literal[False] = False
    user: str | None = None
    nemo_mapo: Extension | None = None

    def sampling(self) -> SamplingConfig:
        """How tokens are drawn; pydantic's ValidationError names a value out of range."""
        extension = self.nemo_mapo or Extension()
        given = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return SamplingConfig(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=extension.repetition_penalty,
            min_new_tokens=extension.min_new_tokens,
            max_new_tokens=DEFAULT_MAX_TOKENS if given is None else given,
        )

    def seeds(self) -> tuple[int, ...]:
        """One seed a completion; ValueError where their number or size is wrong."""
        if self.nemo_mapo is not None and self.nemo_mapo.seeds is not None:
            if len(self.nemo_mapo.seeds) != self.n or self.seed is not None:
                raise ValueError(f"nemo_mapo.seeds must be {self.n} (n), and seed must not be given beside them")
            return self.nemo_mapo.seeds
        first = secrets.randbits(_SEED_BITS) if self.seed is None else self.seed
        if first + self.n > 2**63:
            raise ValueError(f"seed={first} + n={self.n} does not fit 64 bits")
        return tuple(range(first, first + self.n))

    def weights(self) -> WeightId | None:
        """The weights that are asked for; ValueError where only half of their name is given."""
        version = None if self.nemo_mapo is None else self.nemo_mapo.weight_version
        digest = None if self.nemo_mapo is None else self.nemo_mapo.weight_digest
        if version is None and digest is None:
            return None
        if version is None or digest is None:
            raise ValueError("nemo_mapo.weight_version and nemo_mapo.weight_digest go together")
        return WeightId(version=version, digest=digest)


@dataclass(frozen=True, kw_only=True)
class PromptReader:
    """Makes jobs of requests, for one model."""

    tokenizer: PreTrainedTokenizerBase
    audio_tokens: Callable[[int], int]
    """Samples of a clip to audio tokens."""
    sample_rate: int
    max_length: int
    """Tokens of prompt and completion."""
    max_group: int
    """Completions of one request."""

    def job(self, request: ChatRequest, *, deadline: float) -> Job:
        """Check a request and lay out its prompt; ValueError says what is wrong with it."""
        sampling, seeds = request.sampling(), request.seeds()
        if len(seeds) > self.max_group:
            raise ValueError(f"n={len(seeds)} is more than the {self.max_group} completions that are made together")
        waveform, text = self._content(request.messages[0])
        placeholders = 0 if waveform is None else self.audio_tokens(len(waveform))
        given = None if request.nemo_mapo is None else request.nemo_mapo.prompt_token_ids
        if given is None:
            example = Example(id="the message", question=text, choices=(), answer="", task="")
            ids = tuple(encode_prompt(example, placeholders, self.tokenizer, Wording()))
        elif text:
            raise ValueError("a message with nemo_mapo.prompt_token_ids has no text part: the ids are the prompt")
        else:
            ids = self._checked(given, placeholders)
        if len(ids) + sampling.max_new_tokens > self.max_length:
            raise ValueError(
                f"a prompt of {len(ids)} tokens with max_tokens={sampling.max_new_tokens} is longer than the model's "
                f"{self.max_length}"
            )
        return Job(
            token_ids=ids,
            waveform=waveform,
            sampling=sampling,
            seeds=seeds,
            weights=request.weights(),
            deadline=deadline,
        )

    def _checked(self, ids: tuple[int, ...], placeholders: int) -> tuple[int, ...]:
        size = len(self.tokenizer)
        if not ids or not all(0 <= token < size for token in ids):
            raise ValueError(f"nemo_mapo.prompt_token_ids must be ids from 0 to {size - 1}, at least one")
        found = ids.count(SpecialTokens.from_tokenizer(self.tokenizer).audio_id)
        if found != placeholders:
            raise ValueError(
                f"nemo_mapo.prompt_token_ids has {found} audio placeholders, the clip takes {placeholders}"
            )
        return ids

    def _content(self, message: Message) -> tuple[Float[Tensor, " samples"] | None, str]:
        """The clip and the text of a message."""
        if isinstance(message.content, str):
            return None, message.content
        clips = [part.input_audio for part in message.content if isinstance(part, AudioPart)]
        if len(clips) > 1:
            raise ValueError(f"a message has one clip at most, not {len(clips)}")
        text = " ".join(part.text for part in message.content if isinstance(part, TextPart))
        return (self._waveform(clips[0]) if clips else None), text

    def _waveform(self, clip: AudioData) -> Float[Tensor, " samples"]:
        """Decode a clip, channels averaged; its header is looked at first, because a small file can hold hours."""
        try:
            content = base64.b64decode(clip.data, validate=True)
            header = soundfile.info(io.BytesIO(content))
        except (binascii.Error, soundfile.LibsndfileError) as error:
            raise ValueError(f"input_audio.data is no {clip.format} file in base64: {error}") from error
        if header.format.lower() not in (clip.format, f"{clip.format}ex"):
            raise ValueError(f"input_audio.data is {header.format}, input_audio.format says {clip.format}")
        if header.samplerate != self.sample_rate:
            raise ValueError(f"input_audio has {header.samplerate} Hz; resample it to {self.sample_rate} Hz")
        if not header.frames or self.audio_tokens(header.frames) > self.max_length:
            raise ValueError(f"input_audio of {header.frames} samples is empty, or longer than the model can read")
        samples, _ = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
        return torch.from_numpy(samples.mean(axis=1, dtype="float32"))


def chat_answer(request: ChatRequest, job: Job, completions: Sequence[Generated]) -> dict[str, Any]:
    """The body of the answer."""
    completion_tokens = sum(len(completion.token_ids) for completion in completions)
    answer: dict[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [_choice(request, number, completion) for number, completion in enumerate(completions)],
        "usage": {
            "prompt_tokens": len(job.token_ids),
            "completion_tokens": completion_tokens,
            "total_tokens": len(job.token_ids) + completion_tokens,
        },
    }
    if request.nemo_mapo is not None:
        weights = completions[0].weights
        answer["nemo_mapo"] = {
            "prompt_token_ids": job.token_ids,
            "weight_version": weights.version,
            "weight_digest": weights.digest,
        }
    return answer


def _choice(request: ChatRequest, number: int, completion: Generated) -> dict[str, Any]:
    assert all(map(math.isfinite, completion.log_probs)), "the backend refuses what is not finite"
    choice: dict[str, Any] = {
        "index": number,
        "message": {"role": "assistant", "content": completion.text},
        "finish_reason": completion.finish_reason,
        "logprobs": None,
    }
    if request.logprobs:
        choice["logprobs"] = {
            "content": [
                {"token": f"token_id:{token}", "logprob": log_prob, "bytes": None, "top_logprobs": []}
                for token, log_prob in zip(completion.token_ids, completion.log_probs, strict=True)
            ]
        }
    if request.nemo_mapo is not None:
        choice["nemo_mapo"] = {
            "token_ids": completion.token_ids,
            "log_probs": completion.log_probs,
            "sampling_log_probs": completion.sampling_log_probs,
        }
    return choice
