"""Rollouts from a TensorRT-LLM engine in the trainer's process, which hears through the policy's own encoder."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.rollout import TrtllmConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.data.sequences import at_predicting_positions, row_slices, select_rows, token_batch
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.pipeline import evaluation_mode
from nemo_mapo.rollout.checks import never_drawn, refuse_impossible
from nemo_mapo.rollout.completions import Completion, as_rollouts
from nemo_mapo.rollout.prefill_inputs import audio_of
from nemo_mapo.rollout.protocol import Capabilities
from nemo_mapo.rollout.trtllm.answers import EngineCompletions, unpack
from nemo_mapo.rollout.trtllm.calls import TrtllmEngine, engine_sampling
from nemo_mapo.rollout.trtllm.prompt_table import engine_batches, pack_prompts
from nemo_mapo.rollout.trtllm.scoring import completed_log_probs
from nemo_mapo.rollout.trtllm.weights import exported_weights
from nemo_mapo.types import PromptBatch, Rollouts, TokenBatch


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
        """Tie engine and policy together; the engine is built with the first update of the weights.

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
        self.pad_id = special.pad_id
        self._stop_ids = [special.end_id]
        self._forbidden_ids = sorted(never_drawn(set(range(engine.vocab_size)), tokenizer, set(), {special.end_id}))
        # The engine's vocabulary may be padded; the policy's logits are not.
        in_policy = [one for one in self._forbidden_ids if one < model.vocab_size]
        self._forbidden_in_policy = torch.tensor(in_policy, dtype=torch.int64, device=model.device)
        self._version: int | None = None

    @property
    def capabilities(self) -> Capabilities:
        """Everything, up to the model's positions."""
        return Capabilities(audio=True, log_probs=True, max_length=self.model.max_positions)

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
        self, prompts: PromptBatch, sampling: SamplingConfig, *, group_size: int, seeds: Int[Tensor, " batch"]
    ) -> Rollouts:
        """Sample completions; see `RolloutBackend.generate`. The result lies where the prompts lie.

        Raises:
            ValueError: no weights yet, or a request that cannot be served.
            RuntimeError: the engine answered with something else than completions.
            FloatingPointError: the policy's log-probs of what was drawn are not finite.
        """
        if self._version is None:
            raise ValueError("the engine has no weights: call update_weights before each round of generation")
        refuse_impossible(
            prompts, sampling, group_size=group_size, seeds=seeds, batch_size=self.batch_size, model=self.model
        )
        with evaluation_mode(self.model), torch.no_grad():
            parts = [
                self._engine_batch(prompts, chosen, sampling, group_size, seeds)
                for chosen in engine_batches(
                    self._table_rows(prompts),
                    most_prompts=self.batch_size // group_size,
                    most_rows=self.config.max_prompt_embedding_table_size,
                )
            ]
            rollouts = self._rollouts(prompts, group_size, parts)
            return self._with_log_probs(rollouts, sampling)

    def _table_rows(self, prompts: PromptBatch) -> list[int]:
        """Rows of the prompt table that each prompt needs; ValueError where one needs more than there are."""
        valid = torch.arange(prompts.tokens.shape[1], device=prompts.lengths.device) < prompts.lengths[:, None]
        rows: list[int] = ((prompts.tokens == self.model.audio_token_id) & valid).sum(1).tolist()
        most = self.config.max_prompt_embedding_table_size
        for example, needed in zip(prompts.examples, rows, strict=True):
            if needed > most:
                raise ValueError(
                    f"prompt {example.id!r} has {needed} audio tokens, more than "
                    f"rollout.trtllm.max_prompt_embedding_table_size={most}; raise it, or lower the data's max_duration"
                )
        return rows

    def _engine_batch(
        self,
        prompts: PromptBatch,
        chosen: list[int],
        sampling: SamplingConfig,
        group_size: int,
        seeds: Int[Tensor, " batch"],
    ) -> EngineCompletions:
        numbers = torch.tensor(chosen)
        audio, audio_row = audio_of(prompts, numbers)
        part = replace(
            prompts,
            tokens=prompts.tokens[numbers],
            lengths=prompts.lengths[numbers],
            audio=audio,
            audio_row=audio_row,
            examples=tuple(prompts.examples[number] for number in chosen),
        )
        frames, frame_lengths = self._frames(part)
        packed = pack_prompts(
            part,
            frames,
            frame_lengths,
            group_size=group_size,
            vocab_size=self.engine.vocab_size,
            audio_token_id=self.model.audio_token_id,
        )
        rows = (numbers[:, None] * group_size + torch.arange(group_size)).flatten()
        output = self.engine.generate(
            batch_input_ids=packed.batch_input_ids,
            sampling=engine_sampling(
                sampling,
                seeds=seeds[rows.to(seeds.device)],
                stop_ids=self._stop_ids,
                forbidden_ids=self._forbidden_ids,
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
            pad_id=self.pad_id,
        )

    def _frames(self, prompts: PromptBatch) -> tuple[Float[Tensor, "audio frames hidden"], Int[Tensor, " audio"]]:
        """Embeddings of the prompts' clips as the decoder reads them, and how many each has."""
        audio = prompts.audio.to(self.model.device)
        if len(audio.lengths) == 0:
            none = torch.zeros(0, 0, self.model.config.hidden_size, dtype=self.engine.dtype)
            return none, torch.zeros(0, dtype=torch.int64)
        frames, lengths = self.model.perception(audio.waveforms, audio.lengths)
        return frames.to(self.engine.dtype), lengths

    def _rollouts(self, prompts: PromptBatch, group_size: int, parts: list[EngineCompletions]) -> Rollouts:
        """All completions, with the engine's own log-probs in place of both."""
        completions = [
            Completion(
                token_ids=tuple(part.tokens[row, :length].tolist()),
                sampling_log_probs=tuple(part.log_probs[row, :length].tolist()),
                stopped=bool(part.stopped[row]),
            )
            for part in parts
            for row, length in enumerate(part.lengths.tolist())
        ]
        return as_rollouts(
            prompts, completions, self.tokenizer, group_size=group_size, weight_version=self.weight_version
        )

    def _with_log_probs(self, rollouts: Rollouts, sampling: SamplingConfig) -> Rollouts:
        """The rollouts with log-probs as they are meant, from a pass of the policy over them."""
        sequences = token_batch(rollouts, pad_id=self.pad_id)
        model, drawn_from = torch.zeros_like(rollouts.sampling_log_probs), torch.zeros_like(rollouts.sampling_log_probs)
        for rows in row_slices(len(sequences.prompt_lengths), self.config.scoring_batch_size):
            part = select_rows(sequences, rows)
            width = int(part.completion_lengths.max())
            both = self._completed(part, rollouts.sampling_log_probs[rows, :width], sampling)
            model[rows, :width], drawn_from[rows, :width] = both.to(model.device)
        wrong = ~(model.isfinite() & drawn_from.isfinite())
        if bool(wrong.any()):
            row, step = wrong.nonzero()[0].tolist()
            raise FloatingPointError(f"the policy's log-prob of token {step} of completion {row} is not finite")
        return replace(rollouts, log_probs=model, sampling_log_probs=drawn_from)

    def _completed(
        self, sequences: TokenBatch, reported: Float[Tensor, "batch time"], sampling: SamplingConfig
    ) -> Float[Tensor, "2 batch time"]:
        sequences, reported = sequences.to(self.model.device), reported.to(self.model.device)
        logits = self.model(sequences.tokens, sequences.audio, sequences.audio_row).logits
        positions = torch.arange(logits.shape[1], dtype=torch.float64, device=logits.device).expand(len(logits), -1)
        predicting = at_predicting_positions(positions, sequences).long()
        found = torch.zeros(2, *reported.shape, device=logits.device)
        for row, length in enumerate(sequences.completion_lengths.tolist()):
            start = int(sequences.prompt_lengths[row])
            both = completed_log_probs(
                reported[row, :length],
                self.model.whole_vocabulary(logits[row, predicting[row, :length]]),
                sequences.tokens[row, start : start + length],
                sampling,
                forbidden_ids=self._forbidden_in_policy,
            )
            found[0, row, :length], found[1, row, :length] = both.model, both.sampling
        return found
