"""Rollouts from a TensorRT-LLM engine in the trainer's process, with the policy's own encoder for audio."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.rollout import TrtllmConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import PADDED_ROWS, audio_of, in_parts
from nemo_mapo.models.pipeline import evaluation_mode
from nemo_mapo.rollout.checks import never_drawn, refuse_impossible
from nemo_mapo.rollout.completions import Drawn, completed
from nemo_mapo.rollout.trtllm.answers import unpack
from nemo_mapo.rollout.trtllm.calls import TrtllmEngine, engine_sampling
from nemo_mapo.rollout.trtllm.prompt_table import engine_batches, pack_prompts
from nemo_mapo.rollout.trtllm.scoring import TokenLogProbs, completed_log_probs
from nemo_mapo.rollout.trtllm.weights import exported_weights
from nemo_mapo.rows import Completion, Prompt, Row
from nemo_mapo.types import AudioBatch


class TrtllmRollout:
    """A `RolloutBackend` on a TensorRT-LLM engine.

    The policy's perception turns clips into rows of the engine's prompt table. The engine draws tokens; a pass of the
    policy over them completes their log-probs (nemo_mapo/rollout/trtllm/scoring.py).
    """

    def __init__(
        self,
        engine: TrtllmEngine,
        model: AudioLLM,
        tokenizer: PreTrainedTokenizerBase,
        config: TrtllmConfig,
        *,
        batch_size: int,
    ) -> None:
        """Connect engine and policy; the engine is built at the first update of the weights.

        Args:
            engine: takes `batch_size` completions and a prompt table as large as `config` says.
            model: the policy, read in place.
            tokenizer: of the policy's vocabulary.
            config: sizes.
            batch_size: completions that the engine makes together, whole groups only.

        Raises:
            ValueError: the tokenizer lacks a special token.
        """
        self.engine = engine
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.batch_size = batch_size
        special = SpecialTokens.from_tokenizer(tokenizer)
        self._stop_ids = [special.end_id]
        self._forbidden_ids = never_drawn(engine.vocab_size, tokenizer, {special.end_id})
        # The engine's vocabulary may be padded; the policy's logits are not.
        in_policy = [one for one in self._forbidden_ids if one < model.vocab_size]
        self._forbidden_in_policy = torch.tensor(in_policy, dtype=torch.int64, device=model.device)
        self._version: int | None = None

    @property
    def weight_version(self) -> int:
        """Version of the last update; 0 before the first."""
        return self._version or 0

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put the policy's present weights into the engine, which is built the first time; `tensors` are not read.

        Raises:
            ValueError: the engine cannot take a tensor of the policy.
        """
        self._version = None
        self.engine.update(exported_weights(self.model))
        self._version = version

    def release(self) -> None:
        """Unload the engine, if the config says so; the next update loads it again."""
        if self.config.unload_engine_train:
            self._version = None
            self.engine.unload()

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, group_size: int, seeds: Int[Tensor, " batch"]
    ) -> list[list[Completion]]:
        """Sample completions; see `RolloutBackend.generate`.

        Raises:
            ValueError: no weights yet, or a request that cannot be served.
            RuntimeError: the engine answered with something other than completions.
            FloatingPointError: the policy's log-probs of what was drawn are not finite.
        """
        if self._version is None:
            raise ValueError("the engine has no weights: call update_weights before each round of generation")
        refuse_impossible(
            prompts, sampling, group_size=group_size, seeds=seeds, batch_size=self.batch_size, model=self.model
        )
        with evaluation_mode(self.model), torch.no_grad():
            drawn = [
                one
                for chosen in engine_batches(
                    self._table_rows(prompts),
                    most_prompts=self.batch_size // group_size,
                    most_rows=self.config.max_prompt_embedding_table_size,
                )
                for one in self._engine_batch(prompts, chosen, sampling, group_size, seeds)
            ]
            completions = self._scored([prompt for prompt in prompts for _ in range(group_size)], drawn, sampling)
        return [completions[first : first + group_size] for first in range(0, len(completions), group_size)]

    def _table_rows(self, prompts: Sequence[Prompt]) -> list[int]:
        """Rows of the prompt table that each prompt needs; ValueError if one needs more than the table has."""
        rows = [int((prompt.token_ids == self.model.audio_token_id).sum()) for prompt in prompts]
        most = self.config.max_prompt_embedding_table_size
        for prompt, needed in zip(prompts, rows, strict=True):
            if needed > most:
                raise ValueError(
                    f"prompt {prompt.id!r} has {needed} audio tokens, more than "
                    f"rollout.trtllm.max_prompt_embedding_table_size={most}; raise it, or lower the data's max_duration"
                )
        return rows

    def _engine_batch(
        self,
        prompts: Sequence[Prompt],
        chosen: Sequence[int],
        sampling: SamplingConfig,
        group_size: int,
        seeds: Int[Tensor, " batch"],
    ) -> list[Drawn]:
        """Completions of the chosen prompts, with the engine's own log-probs."""
        part = [prompts[number] for number in chosen]
        audio, audio_row = audio_of(part)
        frames, frame_lengths = self._frames(audio)
        packed = pack_prompts(
            part,
            frames,
            frame_lengths,
            audio_row,
            group_size=group_size,
            vocab_size=self.engine.vocab_size,
            audio_token_id=self.model.audio_token_id,
        )
        rows = [number * group_size + member for number in chosen for member in range(group_size)]
        output = self.engine.generate(
            batch_input_ids=packed.batch_input_ids,
            sampling=engine_sampling(
                sampling, seeds=seeds[rows], stop_ids=self._stop_ids, forbidden_ids=self._forbidden_ids
            ),
            prompt_table=packed.prompt_table,
            prompt_tasks=packed.prompt_tasks,
        )
        return unpack(
            output,
            packed.batch_input_ids,
            vocab_size=self.model.vocab_size,
            stop_ids=self._stop_ids,
            max_new_tokens=sampling.max_new_tokens,
        )

    def _frames(self, audio: AudioBatch) -> tuple[Float[Tensor, "audio frames hidden"], Int[Tensor, " audio"]]:
        """Embeddings of clips as the decoder reads them, and how many each has."""
        if len(audio.lengths) == 0:
            none = torch.zeros(0, 0, self.model.config.hidden_size, dtype=self.engine.dtype)
            return none, torch.zeros(0, dtype=torch.int64)
        audio = audio.to(self.model.device)
        frames, lengths = self.model.perception(audio.waveforms, audio.lengths)
        return frames.to(self.engine.dtype), lengths

    def _scored(self, prompts: Sequence[Prompt], drawn: Sequence[Drawn], sampling: SamplingConfig) -> list[Completion]:
        """The completions with corrected log-probs, from a pass of the policy over them."""
        found: list[Completion] = []
        for part in in_parts(list(zip(prompts, drawn, strict=True)), self.config.scoring_batch_size):
            completions = [
                completed(one, prompt, self.tokenizer, weight_version=self.weight_version) for prompt, one in part
            ]
            found += self._completed([prompt for prompt, _ in part], completions, sampling)
        for number, one in enumerate(found):
            assert one.log_probs is not None
            finite = one.log_probs.isfinite() & one.sampling_log_probs.isfinite()
            if not bool(finite.all()):
                step = int((~finite).nonzero()[0])
                raise FloatingPointError(f"the policy's log-prob of token {step} of completion {number} is not finite")
        return found

    def _completed(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], sampling: SamplingConfig
    ) -> list[Completion]:
        rows = [Row(prompt=prompt, token_ids=one.token_ids) for prompt, one in zip(prompts, completions, strict=True)]
        inputs = PADDED_ROWS.lay_out(rows, self.model)

        def scored(logits: Float[Tensor, "time shard"], one: Completion) -> TokenLogProbs:
            return completed_log_probs(
                one.sampling_log_probs.to(logits.device),
                self.model.whole_vocabulary(logits),
                one.token_ids.to(logits.device),
                sampling,
                forbidden_ids=self._forbidden_in_policy,
            )

        by_row = inputs.by_row(inputs.call(self.model, None).logits)
        both = [scored(logits, one) for logits, one in zip(by_row, completions, strict=True)]
        return [
            replace(one, log_probs=each.model.cpu(), sampling_log_probs=each.sampling.cpu())
            for one, each in zip(completions, both, strict=True)
        ]
