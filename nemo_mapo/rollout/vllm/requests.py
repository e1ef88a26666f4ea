"""The two forms in which vLLM accepts our prompts, and its responses."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

import soundfile
import torch
from jaxtyping import Float
from torch import Tensor

from nemo_mapo.http_client import Unreachable
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import audio_of, padded
from nemo_mapo.models.pipeline import evaluation_mode, whole_sequences
from nemo_mapo.rollout.completions import BadAnswer, Drawn
from nemo_mapo.rollout.scoring import Drawing
from nemo_mapo.rows import Prompt

Body = dict[str, Any]

NEVER: Final = -100.0
"""The lowest logit bias that vLLM accepts: a token with it is sampled with a probability of about e^-100."""
PENALTY_ARGUMENT: Final = "completion_penalty"
"""Of the logits processor in plugin/nemo_mapo_penalty.py; vLLM's own penalty counts the prompt as well."""
NO_LOG_PROB: Final = -9999.0
"""Value in vLLM's JSON in place of a log-prob that is NaN or infinite."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RequestPrompt:
    """One prompt as a request carries it."""

    body: Body
    """Its fields."""
    token_ids: tuple[int, ...]
    """Token ids as the policy reads them, with placeholders for audio."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The requested completions of a prompt: one per seed, with consecutive seeds."""

    drawing: Drawing
    first_seed: int
    count: int


@runtime_checkable
class WayIn(Protocol):
    """The form in which prompts are sent to vLLM, which depends on the model."""

    @property
    def path(self) -> str:
        """Route for completions."""
        ...

    def prompts(self, prompts: Sequence[Prompt]) -> list[RequestPrompt]:
        """The prompts one by one; called by all ranks that hold the first pipeline stage."""
        ...

    def body(self, prompt: RequestPrompt, wanted: Wanted) -> Body:
        """A request."""
        ...

    def completions(self, answer: Body, prompt: RequestPrompt, version: str) -> list[Drawn]:
        """Parse a response; KeyError, TypeError, ValueError or BadAnswer if it does not match the request."""
        ...


class PromptEmbeddings:
    """The policy's perception and embedding table make the prompts, vLLM serves the decoder (`/v1/completions`)."""

    path = "/v1/completions"

    def __init__(self, policy: AudioLLM, model: str) -> None:
        self._policy = policy
        self._model = model

    @torch.no_grad()
    def prompts(self, prompts: Sequence[Prompt]) -> list[RequestPrompt]:
        """Each prompt's [time, hidden] in the policy's type, without padding."""
        device = self._policy.device
        audio, audio_row = audio_of(prompts)
        tokens = padded([prompt.token_ids for prompt in prompts])
        with evaluation_mode(self._policy), whole_sequences(self._policy):
            embedded = self._policy.prompt_embeddings(tokens.to(device), audio.to(device), audio_row.to(device)).cpu()
        return [
            RequestPrompt(
                body={"prompt_embeds": _as_base64(rows[: len(prompt)])},
                token_ids=tuple(prompt.token_ids.tolist()),
            )
            for rows, prompt in zip(embedded, prompts, strict=True)
        ]

    def body(self, prompt: RequestPrompt, wanted: Wanted) -> Body:
        """See `WayIn`."""
        return {
            "model": self._model,
            **prompt.body,
            "return_token_ids": True,
            **_sampling_fields(wanted, arguments="vllm_xargs"),
        }

    def completions(self, answer: Body, prompt: RequestPrompt, version: str) -> list[Drawn]:
        """See `WayIn`; this endpoint does not report the version, which is checked before and after."""
        return [
            _completion(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"])
            for choice in sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        ]


class NativeAudio:
    """vLLM serves the whole thinker and gets token ids and the clip (`/inference/v1/generate`)."""

    path = "/inference/v1/generate"

    def __init__(self, model: str, *, audio_id: int, sample_rate: int) -> None:
        self._model = model
        self._audio_id = audio_id
        self._sample_rate = sample_rate

    def prompts(self, prompts: Sequence[Prompt]) -> list[RequestPrompt]:
        """Ids with one placeholder for each clip, which vLLM expands; clips as WAV of 32-bit floats, without loss."""
        found = []
        for prompt in prompts:
            ids = prompt.token_ids.tolist()
            body: Body = {"token_ids": _runs_as_one(ids, self._audio_id)}
            if prompt.clips:
                urls = [_as_wav(clip, self._sample_rate) for clip in prompt.clips]
                body["content_parts"] = [{"type": "audio_url", "url": url} for url in urls]
            found.append(RequestPrompt(body=body, token_ids=tuple(ids)))
        return found

    def body(self, prompt: RequestPrompt, wanted: Wanted) -> Body:
        """See `WayIn`."""
        sampling = {**_sampling_fields(wanted, arguments="extra_args"), "detokenize": False}
        return {"model": self._model, **prompt.body, "return_token_ids": True, "sampling_params": sampling}

    def completions(self, answer: Body, prompt: RequestPrompt, version: str) -> list[Drawn]:
        """See `WayIn`; the ids that were read and the weights of every token have to be those asked for."""
        read = answer["prompt_token_ids"]
        if list(read) != list(prompt.token_ids):
            raise BadAnswer(
                f"vLLM read a prompt of {len(read)} tokens, another than that of {len(prompt.token_ids)} asked for"
            )
        found = []
        for choice in sorted(answer["choices"], key=lambda choice: int(choice["index"])):
            versions = {span["version"] for span in choice["weight_versions"]}
            if versions != {version}:
                raise WrongWeights(f"tokens are from weights {sorted(versions)}, asked for were {version}")
            log_probs = [token["logprob"] for token in choice["logprobs"]["content"]]
            found.append(_completion(choice["token_ids"], log_probs, choice["finish_reason"]))
        return found


class WrongWeights(Exception):
    """Completions drawn from other weights; they are discarded."""


def _sampling_fields(wanted: Wanted, *, arguments: str) -> Body:
    """`arguments` is the endpoint's field for arguments of our own logits processor."""
    sampling = wanted.drawing.sampling
    fields: Body = {
        # Greedy completions are all the same, and vLLM draws one only.
        "n": wanted.count if sampling.temperature else 1,
        "seed": wanted.first_seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        arguments: {PENALTY_ARGUMENT: sampling.repetition_penalty},
        "min_tokens": sampling.min_new_tokens,
        "max_tokens": sampling.max_new_tokens,
        # The tokenizer's own end of text is no stop token of ours, unless it is named here.
        "ignore_eos": True,
        "stop_token_ids": list(wanted.drawing.stop_ids),
        "logprobs": 0,
    }
    if wanted.drawing.never_drawn:
        fields["logit_bias"] = {str(token): NEVER for token in wanted.drawing.never_drawn}
    return fields


def _completion(token_ids: Sequence[int], log_probs: Sequence[float], finish_reason: str) -> Drawn:
    if finish_reason == "abort":
        raise Unreachable("the server broke the completion off")
    if finish_reason not in ("stop", "length"):
        raise BadAnswer(f"finish_reason {finish_reason!r} is neither stop nor length")
    if any(value <= NO_LOG_PROB for value in log_probs):
        raise BadAnswer("a log-prob is not finite")
    return Drawn(
        token_ids=tuple(token_ids),
        sampling_log_probs=tuple(map(float, log_probs)),
        stopped=finish_reason == "stop",
    )


def _as_base64(rows: Float[Tensor, "time hidden"]) -> str:
    file = io.BytesIO()
    # A view would be saved with all of its storage.
    torch.save(rows.clone(), file)
    return base64.b64encode(file.getvalue()).decode()


def _as_wav(waveform: Float[Tensor, " samples"], sample_rate: int) -> str:
    file = io.BytesIO()
    soundfile.write(file, waveform.numpy(), sample_rate, format="WAV", subtype="FLOAT")
    return "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode()


def _runs_as_one(ids: Sequence[int], token: int) -> list[int]:
    """The ids with every run of `token` as a single one."""
    return [one for number, one in enumerate(ids) if one != token or number == 0 or ids[number - 1] != token]
