"""Rollouts from the policy itself: batched generation over Megatron-core's static KV cache."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from jaxtyping import Bool, Float, Float64, Int
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.attention.session import Deafness
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.data.prompts import whole_text
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import PADDING_SEGMENT, SEQUENCE_SEGMENT, audio_batch, audio_of, left_padded
from nemo_mapo.models.pipeline import evaluation_mode, forward_all_stages, from_last_stage, whole_sequences
from nemo_mapo.ranks import any_expert_rank
from nemo_mapo.rollout.checks import never_drawn, refuse_impossible
from nemo_mapo.rollout.deaf import DeafGeneration, DeafTokens
from nemo_mapo.rollout.kv_cache import SlotCache
from nemo_mapo.rollout.sampling import row_uniforms, sample, sampling_distribution, token_log_probs
from nemo_mapo.rows import Completion, Prompt
from nemo_mapo.types import AudioBatch
from nemo_mapo.upstream.megatron import key_value_cache

COMPACTION_SHARE: Final = 0.75
"""Finished rows leave the batch, and waiting prompts take their slots, when at most this share of it is still being
decoded. Measured on one core, 64 rows of unequal length, 5 layers of width 192, no prompt waiting: 27 to 43 % less time
than keeping them, and within 5 % of a share of 0.9."""


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """What was drawn, for all completions of a call; time is max_new_tokens."""

    tokens: Int[Tensor, "batch time"]
    log_probs: Float[Tensor, "batch time"]
    sampling_log_probs: Float[Tensor, "batch time"]
    lengths: Int[Tensor, " batch"]
    stopped: Bool[Tensor, " batch"]

    @classmethod
    def empty(cls, batch: int, time: int, *, pad_id: int, device: torch.device) -> "_Samples":
        return cls(
            tokens=torch.full((batch, time), pad_id, device=device),
            log_probs=torch.zeros(batch, time, device=device),
            sampling_log_probs=torch.zeros(batch, time, device=device),
            lengths=torch.zeros(batch, dtype=torch.int64, device=device),
            stopped=torch.zeros(batch, dtype=torch.bool, device=device),
        )


@dataclass(frozen=True, kw_only=True)
class _Read:
    """Prompts that have been computed, each once, and the completions that begin with them."""

    context: StaticInferenceContext
    copies: Int[Tensor, " arriving"]
    """Row of `context` for each completion."""
    rows: Int[Tensor, " arriving"]
    """Their rows in `_Samples`."""
    segment_ids: Int[Tensor, "arriving width"]
    logits: Float[Tensor, "arriving vocab"]


@dataclass(frozen=True, kw_only=True)
class _Live:
    """Completions being decoded together, slot by slot, and the logits of their next token."""

    rows: Int[Tensor, " live"]
    """Their rows in `_Samples`."""
    steps: Int[Tensor, " live"]
    """Tokens of each that have been drawn."""
    most_steps: int
    """No less than any of these."""
    segment_ids: Int[Tensor, "live cache"]
    """0 on left padding, 1 elsewhere, up to the end of the cache."""
    logits: Float[Tensor, "live vocab"]


class MegatronRollout:
    """A `RolloutBackend` that samples from the training weights in place.

    Each prompt is computed once; its keys and values serve all completions of its group. Prompts of unequal
    length are padded on the left. Finished rows leave the batch, and waiting prompts take their slots.
    """

    weight_version: int
    """Set by `update_weights`."""

    def __init__(
        self,
        model: AudioLLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        forbidden_token_ids: Sequence[int] = (),
        stop_token_ids: Sequence[int] | None = None,
        weight_version: int = 0,
    ) -> None:
        """Connect the backend to a model.

        Args:
            model: the policy; generation changes neither its weights nor its mode.
            tokenizer: of the model's vocabulary; must have the project's special tokens.
            batch_size: completions decoded together, whole groups only.
            forbidden_token_ids: never drawn, besides the tokenizer's special tokens (padding, audio, roles) and ids
                that it does not know.
            stop_token_ids: end a completion, special or not; None is the end-of-turn token.
            weight_version: of the weights as they are now.

        Raises:
            ValueError: if the tokenizer lacks a special token, an id is not in the vocabulary, a stop token is
                forbidden, or nothing but stop tokens could be drawn.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.weight_version = weight_version
        special = SpecialTokens.from_tokenizer(tokenizer)
        self.pad_id = special.pad_id
        stops = {special.end_id} if stop_token_ids is None else set(stop_token_ids)
        forbidden = never_drawn(model.vocab_size, tokenizer, stops, set(forbidden_token_ids))
        self._device = next(model.parameters()).device
        self._forbidden_ids = torch.tensor(forbidden, device=self._device)
        self._stop_ids = torch.tensor(sorted(stops), device=self._device)
        self._deaf: DeafGeneration | None = None

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Record the version: generation reads the training weights in place."""
        self.weight_version = version

    def release(self) -> None:
        """Nothing: caches live for a call only."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        group_size: int,
        seeds: Int[Tensor, " batch"],
        deaf: DeafTokens | None = None,
    ) -> list[list[Completion]]:
        """Sample completions; see `RolloutBackend.generate`.

        `deaf` tokens are drawn without attention to the audio (an intervention for analyses).

        Raises:
            ValueError: if there are no prompts, the group does not fit `batch_size`, the seeds are not one int64 per
                completion, or a prompt with `max_new_tokens` is longer than the model's positions.
            FloatingPointError: if the model gave logits that are not finite.
        """
        refuse_impossible(
            prompts, sampling, group_size=group_size, seeds=seeds, batch_size=self.batch_size, model=self.model
        )
        samples = _Samples.empty(len(seeds), sampling.max_new_tokens, pad_id=self.pad_id, device=self._device)
        uniforms = row_uniforms(seeds, sampling.max_new_tokens).to(self._device)
        audio_id = self.model.audio_token_id
        self._deaf = None
        if deaf is not None:
            self._deaf = DeafGeneration(deaf, prompts, audio_token_id=audio_id, group_size=group_size)
        # Not inference_mode, which is no faster: tables that modules build on demand and keep (Megatron's rotary
        # one) would be inference tensors, and autograd refuses to save those in a later training step.
        with evaluation_mode(self.model), whole_sequences(self.model), torch.no_grad():
            self._sample_all(prompts, sampling, group_size, samples, uniforms)
        _refuse_non_finite(samples)
        return self._completions(prompts, group_size, samples)

    def _sample_all(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        group_size: int,
        samples: _Samples,
        uniforms: Float64[Tensor, "batch time"],
    ) -> None:
        """Draw every completion into `samples`: groups wait, longest prompt first, until slots are free.

        All rows are at the same position of the cache. A prompt that takes the slots of finished rows is computed by
        itself, and its keys are rotated to the position where it then ends; attention depends only on distances. When
        the cache has no room for another whole completion, the rows in it are completed, and the next round begins
        with an empty cache.
        """
        waiting = deque(sorted(range(len(prompts)), key=lambda number: -len(prompts[number])))
        together = self.batch_size // group_size
        # Ranks whose experts are sharded make the same calls, so none of them may refill slots on its own.
        refills = len(waiting) > together and parallel_state.get_expert_model_parallel_world_size() == 1
        room = max(map(len, prompts)) + sampling.max_new_tokens * (2 if refills else 1)
        cache = SlotCache(min(together, len(waiting)) * group_size, room)
        while waiting:
            read = self._prefill(prompts, _next_prompts(waiting, together), group_size)
            cache.begin(read.context.sequence_len_offset)
            live = self._seated(cache, read, behind=None)
            self._decode(cache, live, sampling, samples, uniforms, prompts, group_size, waiting if refills else deque())

    def _prefill(self, prompts: Sequence[Prompt], chosen: Sequence[int], group_size: int) -> _Read:
        """Read the chosen prompts once each."""
        read = [prompts[number] for number in chosen]
        tokens, segment_ids = left_padded(read, pad_id=self.pad_id)
        audio, audio_row = audio_of(read)
        context = key_value_cache(len(chosen), tokens.shape[1])
        unpadded = bool((segment_ids == SEQUENCE_SEGMENT).all())
        logits = self._next_logits(
            tokens.to(self._device),
            audio.to(self._device),
            audio_row.to(self._device),
            segment_ids=None if unpadded else segment_ids.to(self._device),
            context=context,
            deaf=None if self._deaf is None else self._deaf.prompts(chosen, tokens.shape[1]).to(self._device),
        )
        context.sequence_len_offset = tokens.shape[1]
        copies = torch.arange(len(chosen), device=self._device).repeat_interleave(group_size)
        rows = [number * group_size + member for number in chosen for member in range(group_size)]
        return _Read(
            context=context,
            copies=copies,
            rows=torch.tensor(rows, device=self._device),
            segment_ids=segment_ids.to(self._device)[copies],
            logits=logits[copies],
        )

    def _decode(
        self,
        cache: SlotCache,
        live: _Live,
        sampling: SamplingConfig,
        samples: _Samples,
        uniforms: Float64[Tensor, "batch time"],
        prompts: Sequence[Prompt],
        group_size: int,
        waiting: deque[int],
    ) -> None:
        """Draw until every row has stopped or is at the length limit; results go into `samples`."""
        slots = len(live.rows)
        while True:
            tokens = self._draw(live, sampling, samples, uniforms)
            going_on = ~samples.stopped[live.rows] & (live.steps < sampling.max_new_tokens)
            # The only synchronisation with the device per token.
            remaining = int(going_on.sum())
            if not any_expert_rank(remaining > 0):
                return
            if remaining <= COMPACTION_SHARE * len(live.rows):
                # A stopped row is a filler if other ranks still need the experts of this rank.
                kept = going_on.nonzero().flatten() if remaining else torch.zeros_like(live.rows[:1])
                order = cache.close_ranks(kept)
                live, tokens = _reordered(live, order), tokens[order]
            live = self._advance(cache, live, tokens)
            free = (slots - len(live.rows)) // group_size
            fits = cache.end + sampling.max_new_tokens <= cache.room
            if waiting and fits and len(live.rows) <= COMPACTION_SHARE * slots and free > 0:
                read = self._prefill(prompts, _next_prompts(waiting, free), group_size)
                live = self._seated(cache, read, behind=live)

    def _seated(self, cache: SlotCache, read: _Read, *, behind: _Live | None) -> _Live:
        """Rows that have just been read in the slots behind those that are being decoded, all of them together."""
        first = 0 if behind is None else len(behind.rows)
        cache.admit(read.context, read.copies, first=first, rotate=self.model.rotated_keys)
        start = cache.end - read.segment_ids.shape[1]
        segment_ids = read.segment_ids.new_full((len(read.rows), cache.room), SEQUENCE_SEGMENT)
        segment_ids[:, :start] = PADDING_SEGMENT
        segment_ids[:, start : cache.end] = read.segment_ids
        arrived = _Live(
            rows=read.rows,
            steps=torch.zeros_like(read.rows),
            most_steps=0,
            segment_ids=segment_ids,
            logits=read.logits,
        )
        if behind is None:
            return arrived
        return _Live(
            rows=torch.cat((behind.rows, arrived.rows)),
            steps=torch.cat((behind.steps, arrived.steps)),
            most_steps=behind.most_steps,
            segment_ids=torch.cat((behind.segment_ids, arrived.segment_ids)),
            logits=torch.cat((behind.logits, arrived.logits)),
        )

    def _draw(
        self, live: _Live, sampling: SamplingConfig, samples: _Samples, uniforms: Float64[Tensor, "batch time"]
    ) -> Int[Tensor, " live"]:
        """Draw a token for every row and write it down; a row that is done gets the pad token and keeps what it has."""
        rows, steps = live.rows, live.steps.clamp(max=sampling.max_new_tokens - 1)
        done = samples.stopped[rows] | (live.steps >= sampling.max_new_tokens)
        distribution = sampling_distribution(
            live.logits,
            sampling,
            generated=samples.tokens[rows, : live.most_steps],
            forbidden_ids=self._forbidden_ids,
            stop_ids=self._stop_ids,
            steps=steps,
        )
        drawn = sample(distribution, uniforms[rows, steps])
        drawn_from = distribution.gather(1, drawn[:, None]).squeeze(1)
        for kept, new in (
            (samples.tokens, drawn),
            (samples.log_probs, token_log_probs(live.logits, drawn)),
            (samples.sampling_log_probs, drawn_from),
        ):
            kept[rows, steps] = torch.where(done, kept[rows, steps], new)
        samples.lengths[rows] += ~done
        samples.stopped[rows] |= torch.isin(drawn, self._stop_ids) & ~done
        live.steps.add_(1)
        return drawn.masked_fill(done, self.pad_id)

    def _advance(self, cache: SlotCache, live: _Live, tokens: Int[Tensor, " live"]) -> _Live:
        """Read one token per row."""
        position = cache.end
        logits = self._next_logits(
            tokens[:, None],
            audio_batch([]).to(self._device),
            torch.full_like(live.rows, -1),
            segment_ids=live.segment_ids[:, : position + 1],
            context=cache.context,
            deaf=None if self._deaf is None else self._deaf.step(live.rows, live.steps, position),
        )
        cache.context.sequence_len_offset = position + 1
        return replace(live, most_steps=live.most_steps + 1, logits=logits)

    def _next_logits(
        self,
        tokens: Int[Tensor, "live time"],
        audio: AudioBatch,
        audio_row: Int[Tensor, "live *clips"],
        *,
        segment_ids: Int[Tensor, "live cache"] | None,
        context: StaticInferenceContext,
        deaf: Deafness | None,
    ) -> Float[Tensor, "live vocab"]:
        """Logits of the token after the last one read, the same on all ranks of a model replica."""
        output = forward_all_stages(
            self.model,
            tokens,
            audio,
            audio_row,
            segment_ids=segment_ids,
            read_at=torch.tensor([tokens.shape[1] - 1], device=tokens.device),
            inference_context=context,
            deaf=deaf,
        )
        last = None if output is None else self.model.whole_vocabulary(output.logits[:, -1])
        return from_last_stage(last, (len(tokens), self.model.vocab_size), next(self.model.parameters()))

    def _completions(self, prompts: Sequence[Prompt], group_size: int, samples: _Samples) -> list[list[Completion]]:
        tokens, log_probs = samples.tokens.cpu(), samples.log_probs.cpu()
        sampling_log_probs = samples.sampling_log_probs.cpu()
        lengths, stopped = samples.lengths.tolist(), samples.stopped.tolist()

        def completion(prompt: Prompt, row: int) -> Completion:
            length = lengths[row]
            return Completion(
                token_ids=tokens[row, :length],
                sampling_log_probs=sampling_log_probs[row, :length],
                log_probs=log_probs[row, :length],
                stopped=stopped[row],
                text=whole_text(prompt, tokens[row, : length - stopped[row]].tolist(), self.tokenizer),
                weight_version=self.weight_version,
            )

        return [
            [completion(prompt, number * group_size + member) for member in range(group_size)]
            for number, prompt in enumerate(prompts)
        ]


def _refuse_non_finite(samples: _Samples) -> None:
    """Checked once, after the last token: tokens drawn from NaN must not become samples."""
    wrong = ~(samples.log_probs.isfinite() & samples.sampling_log_probs.isfinite())
    if bool(wrong.any()):
        row, step = wrong.nonzero()[0].tolist()
        raise FloatingPointError(
            f"the model's distribution of token {step} of completion {row} is not finite; the weights are broken"
        )


def _next_prompts(waiting: deque[int], most: int) -> list[int]:
    """Take the first `most` of those that wait."""
    return [waiting.popleft() for _ in range(min(most, len(waiting)))]


def _reordered(live: _Live, order: Int[Tensor, " kept"]) -> _Live:
    """The rows of these slots, in that order."""
    return replace(
        live,
        rows=live.rows[order],
        steps=live.steps[order],
        segment_ids=live.segment_ids[order],
        logits=live.logits[order],
    )
