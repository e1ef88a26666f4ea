"""What the servers differ in: fields of requests and answers, and what each can give. One class a server."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import soundfile
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.rollout import RolloutServerConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.rollout.protocol import Capabilities

Body = dict[str, Any]


class BadAnswer(RuntimeError):
    """A server answered with something else than what was asked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptRow:
    """One prompt as a request needs it."""

    token_ids: tuple[int, ...]
    waveform: Float[Tensor, " samples"] | None
    sample_rate: int
    """Hz."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which completions of a prompt: one a seed, from which weights."""

    sampling: SamplingConfig
    seeds: tuple[int, ...]
    weight_version: int
    weight_digest: str | None
    """None where no update was sent."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One completion as a server gave it."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    sampling_log_probs: tuple[float, ...]
    stopped: bool
    """Whether a stop token ended it; else the length limit did."""


@runtime_checkable
class ServerAdapter(Protocol):
    """Speaks to one kind of server."""

    @property
    def path(self) -> str:
        """Where completions are asked for."""
        ...

    @property
    def takes_weights(self) -> bool:
        """Whether the server can be given the policy's weights, so that it can train."""
        ...

    @property
    def completions_per_request(self) -> int | None:
        """Most completions of a request whose seeds can be told; None is any number."""
        ...

    def capabilities(self, model: Body) -> Capabilities:
        """What the server can do, from its entry of /v1/models; BadAnswer where it does not say."""
        ...

    def refuse(self, sampling: SamplingConfig) -> None:
        """ValueError naming a sampling option that the server does not have, or whose log-probs it does not give."""
        ...

    def request(self, model: str, prompt: PromptRow, wanted: Wanted) -> Body:
        """Body of a request."""
        ...

    def completions(self, answer: Body, prompt: PromptRow, wanted: Wanted) -> list[Completion]:
        """Read an answer; KeyError, IndexError, TypeError, ValueError or BadAnswer where it is another than asked."""
        ...


def adapter_of(config: RolloutServerConfig, tokenizer: PreTrainedTokenizerBase) -> ServerAdapter:
    """The adapter of `rollout.server.kind`."""
    if config.kind == "vllm":
        return VllmAdapter(tokenizer)
    if config.kind == "trtllm":
        return TrtllmAdapter(tokenizer)
    return NemoMapoAdapter()


class NemoMapoAdapter:
    """`examples/serve_rollouts.py`: token ids both ways, both log-probs, a seed a completion, named weights."""

    path = "/v1/chat/completions"
    takes_weights = True
    completions_per_request: int | None = None

    def capabilities(self, model: Body) -> Capabilities:
        """From the extension of /v1/models."""
        try:
            return Capabilities(**model["nemo_mapo"])
        except (KeyError, TypeError) as error:
            raise BadAnswer(f"no rollout server of nemo_mapo lists {model}; set rollout.server.kind") from error

    def refuse(self, sampling: SamplingConfig) -> None:
        """All of them are served."""

    def request(self, model: str, prompt: PromptRow, wanted: Wanted) -> Body:
        """The ids are the prompt; the clip travels without loss."""
        sampling = wanted.sampling
        return {
            "model": model,
            "messages": [{"role": "user", "content": audio_parts(prompt)}],
            "n": len(wanted.seeds),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_new_tokens,
            "nemo_mapo": {
                "prompt_token_ids": prompt.token_ids,
                "seeds": wanted.seeds,
                "weight_version": None if wanted.weight_digest is None else wanted.weight_version,
                "weight_digest": wanted.weight_digest,
                "repetition_penalty": sampling.repetition_penalty,
                "min_new_tokens": sampling.min_new_tokens,
            },
        }

    def completions(self, answer: Body, prompt: PromptRow, wanted: Wanted) -> list[Completion]:
        """From the extension; the answer names its weights and its prompt, which have to be those asked for."""
        extension = answer["nemo_mapo"]
        if wanted.weight_digest is not None:
            asked, given = (
                (wanted.weight_version, wanted.weight_digest),
                (extension["weight_version"], extension["weight_digest"]),
            )
            if asked != given:
                raise BadAnswer(f"the completions are from weights {given}, asked for were {asked}")
        _check_prompt(prompt.token_ids, extension["prompt_token_ids"])
        return [
            Completion(
                token_ids=tuple(choice["nemo_mapo"]["token_ids"]),
                log_probs=_floats(choice["nemo_mapo"]["log_probs"]),
                sampling_log_probs=_floats(choice["nemo_mapo"]["sampling_log_probs"]),
                stopped=_stopped(choice["finish_reason"]),
            )
            for choice in answer["choices"]
        ]


class VllmAdapter:
    """vLLM's OpenAI server (fields as documented for 0.10 and later). Has not been run here.

    It gives log-probs under the unmodified model (its `--logprobs-mode raw_logprobs`, the default), so sampling options
    that change the distribution are refused. Its chat template has to render the project's layout: the prompt ids that
    it reports are compared. It gets no weights from here.
    """

    path = "/v1/chat/completions"
    takes_weights = False
    completions_per_request: int | None = 1

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = SpecialTokens.from_tokenizer(tokenizer)

    def capabilities(self, model: Body) -> Capabilities:
        """From /v1/models, which does not say whether the model hears."""
        return Capabilities(audio=True, log_probs=True, max_length=int(model["max_model_len"]))

    def refuse(self, sampling: SamplingConfig) -> None:
        """Whatever makes the distribution sampled from another than the model's."""
        _refuse_changed_distribution("vllm", sampling)

    def request(self, model: str, prompt: PromptRow, wanted: Wanted) -> Body:
        """Text and clip of the prompt, and the ids of the answer back."""
        text = self._tokenizer.decode(list(prompt.token_ids), skip_special_tokens=True).strip()
        return {
            "model": model,
            "messages": [{"role": "user", "content": [*audio_parts(prompt), {"type": "text", "text": text}]}],
            "n": 1,
            "seed": wanted.seeds[0],
            "temperature": wanted.sampling.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": wanted.sampling.max_new_tokens,
            "stop_token_ids": [self._special.end_id],
            "logprobs": True,
            "top_logprobs": 0,
            "return_token_ids": True,
        }

    def completions(self, answer: Body, prompt: PromptRow, wanted: Wanted) -> list[Completion]:
        """Ids and log-probs; audio placeholders are compared by where they are, not by how many there are."""
        audio = self._special.audio_id
        _check_prompt(_runs_as_one(prompt.token_ids, audio), _runs_as_one(answer["prompt_token_ids"], audio))
        return [
            _unmodified(
                choice["token_ids"],
                [token["logprob"] for token in choice["logprobs"]["content"]],
                wanted.sampling,
                _stopped(choice["finish_reason"]),
            )
            for choice in answer["choices"]
        ]


class TrtllmAdapter:
    """trtllm-serve (fields as documented for 1.0 and later). Has not been run here.

    Only its text completions take and give token ids, so audio is refused; its documentation promises no other
    log-probs than one a token, which are taken for the model's, so sampling options that change the distribution are
    refused. It gets no weights from here.
    """

    path = "/v1/completions"
    takes_weights = False
    completions_per_request: int | None = 1

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._special = SpecialTokens.from_tokenizer(tokenizer)

    def capabilities(self, model: Body) -> Capabilities:
        """/v1/models names no length there; the server refuses what is too long."""
        return Capabilities(audio=False, log_probs=True, max_length=2**31 - 1)

    def refuse(self, sampling: SamplingConfig) -> None:
        """Whatever makes the distribution sampled from another than the model's."""
        _refuse_changed_distribution("trtllm", sampling)

    def request(self, model: str, prompt: PromptRow, wanted: Wanted) -> Body:
        """Ids in, ids out; ValueError for a prompt with audio."""
        if prompt.waveform is not None:
            raise ValueError("rollout.server.kind=trtllm: its completions take no audio; use kind=nemo_mapo or vllm")
        return {
            "model": model,
            "prompt": prompt.token_ids,
            "n": 1,
            "seed": wanted.seeds[0],
            "temperature": wanted.sampling.temperature,
            "max_tokens": wanted.sampling.max_new_tokens,
            "stop_token_ids": [self._special.end_id],
            "include_stop_str_in_output": True,
            "add_special_tokens": False,
            "logprobs": 1,
            "detokenize": False,
        }

    def completions(self, answer: Body, prompt: PromptRow, wanted: Wanted) -> list[Completion]:
        """Ids and log-probs."""
        return [
            _unmodified(
                choice["token_ids"],
                choice["logprobs"]["token_logprobs"],
                wanted.sampling,
                _stopped(choice["finish_reason"]),
            )
            for choice in answer["choices"]
        ]


def audio_parts(prompt: PromptRow) -> list[Body]:
    """The `input_audio` part of a prompt with a clip: WAV of 32-bit floats, which loses nothing."""
    if prompt.waveform is None:
        return []
    file = io.BytesIO()
    soundfile.write(file, prompt.waveform.numpy(), prompt.sample_rate, format="WAV", subtype="FLOAT")
    data = base64.b64encode(file.getvalue()).decode()
    return [{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}]


def check_completions(completions: Sequence[Completion], wanted: Wanted, vocab_size: int) -> None:
    """BadAnswer unless there is a whole completion for every seed: nothing else may become a sample."""
    if len(completions) != len(wanted.seeds):
        raise BadAnswer(f"{len(completions)} completions for {len(wanted.seeds)} seeds")
    for completion in completions:
        length = len(completion.token_ids)
        if length == 0:
            raise BadAnswer("a completion is empty")
        if not length == len(completion.log_probs) == len(completion.sampling_log_probs):
            raise BadAnswer(f"a completion of {length} tokens has {len(completion.log_probs)} log-probs")
        if not all(isinstance(token, int) and 0 <= token < vocab_size for token in completion.token_ids):
            raise BadAnswer(f"a token id is not one of the {vocab_size} of the tokenizer")
        if not all(math.isfinite(value) for value in (*completion.log_probs, *completion.sampling_log_probs)):
            raise BadAnswer("a log-prob is not finite")
        limit = wanted.sampling.max_new_tokens
        if length > limit or (length < limit and not completion.stopped):
            raise BadAnswer(f"a completion of {length} tokens ended at the length limit, which is {limit}")


def _check_prompt(asked: Sequence[int], given: Sequence[int]) -> None:
    if list(asked) != list(given):
        raise BadAnswer(f"the server read a prompt of {len(given)} tokens, another than that of {len(asked)} asked for")


def _floats(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(map(float, values))


def _stopped(finish_reason: str) -> bool:
    if finish_reason not in ("stop", "length"):
        raise BadAnswer(f"finish_reason {finish_reason!r} is neither stop nor length")
    return finish_reason == "stop"


def _runs_as_one(ids: Sequence[int], token: int) -> list[int]:
    """The ids with every run of `token` as a single one."""
    return [one for number, one in enumerate(ids) if one != token or number == 0 or ids[number - 1] != token]


def _unmodified(ids: Sequence[int], log_probs: Sequence[float], sampling: SamplingConfig, stopped: bool) -> Completion:
    """A completion drawn from the model's own distribution, or greedily (which draws with certainty)."""
    drawn_from = [0.0] * len(log_probs) if sampling.temperature == 0 else log_probs
    return Completion(
        token_ids=tuple(ids), log_probs=_floats(log_probs), sampling_log_probs=_floats(drawn_from), stopped=stopped
    )


def _refuse_changed_distribution(kind: str, sampling: SamplingConfig) -> None:
    neutral = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
    changed = [f"{name}={vars(sampling)[name]}" for name, value in neutral.items() if vars(sampling)[name] != value]
    if sampling.temperature not in (0, 1):
        changed.append(f"temperature={sampling.temperature}")
    if changed:
        raise ValueError(
            f"rollout.server.kind={kind} gives no log-probs of the distribution sampled from, so rollout.sampling."
            f"{changed[0]} cannot be used with it; leave it out, or use kind=nemo_mapo"
        )
