"""The audio language model: perception, then a Megatron-core decoder reading audio as placeholder tokens."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from megatron.core import parallel_state, tensor_parallel
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from nemo_mapo.attention.session import AttentionSession, Deafness, HeadReduction
from nemo_mapo.config.model import ModelConfig
from nemo_mapo.models.decoder import build_decoder
from nemo_mapo.models.perception import build_perception
from nemo_mapo.types import AudioBatch


@dataclass(frozen=True, kw_only=True)
class AudioLLMOutput:
    """Output of the last pipeline stage for one forward pass."""

    logits: Float[Tensor, "batch read vocab"]
    """This rank's shard of the vocabulary; columns that only pad the vocabulary are -inf."""
    audio_mass: Float[Tensor, "batch read"] | None
    """a: mean over target layers of the maximum (or mean) over all heads; differentiable."""


class AudioLLM(MegatronModule):  # type: ignore[misc]
    """Perception + decoder, or this rank's part of them.

    Token index = position everywhere, counted from each sequence's start. Embeddings of the placeholder tokens are
    replaced, in order, by the valid frames of the sequence's audio clips. Perception lives on the first pipeline stage
    and is replicated on every tensor-parallel rank.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        vocab_size: int,
        audio_token_id: int,
        sample_rate: int,
        params_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.session = AttentionSession(config.resolved_target_layers)
        shards = config.tensor_model_parallel_size
        self.vocab_size = _embedding_rows(config.decoder.vocab_size, vocab_size)
        padded = math.ceil(self.vocab_size / shards) * shards
        language_model = build_decoder(config, vocab_size=padded, session=self.session, params_dtype=params_dtype)
        super().__init__(config=language_model.config)
        self.language_model = language_model
        perception = build_perception(config.perception, config.decoder.hidden_size, sample_rate).to(params_dtype)
        if language_model.pre_process:
            self.perception = perception
        self.num_audio_tokens = perception.num_tokens
        """Placeholders of a clip with this many samples; known on every pipeline stage."""
        self.audio_token_id = audio_token_id
        self.max_positions = config.decoder.max_position_embeddings
        self.rotary_base = config.decoder.rotary_base
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = language_model.pre_process, language_model.post_process
        self.tensor_group = parallel_state.get_tensor_model_parallel_group() if shards > 1 else None
        self.vocab_start = parallel_state.get_tensor_model_parallel_rank() * (padded // shards)

    @property
    def fill_id(self) -> int:
        """What stands in padding, which is never read: any token that does not stand for audio."""
        return 0 if self.audio_token_id != 0 else 1

    @property
    def device(self) -> torch.device:
        """Device of this rank's weights."""
        device: torch.device = next(self.parameters()).device
        return device

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take the hidden states of the previous pipeline stage, as Megatron's schedules pass them."""
        self.language_model.set_input_tensor(input_tensor)

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        """Whether first and last stage hold a tied embedding that is trained, whose gradients Megatron adds up."""
        tied: bool = self.language_model.share_embeddings_and_output_weights
        return tied and self.shared_embedding_or_output_weight().requires_grad

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The tied embedding, for Megatron's reduction of its gradient over the first and the last stage."""
        weight: Tensor = self.language_model.shared_embedding_or_output_weight()
        return weight

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        audio: AudioBatch,
        audio_row: Int[Tensor, " sequence *clips"],
        *,
        segment_ids: Int[Tensor, "batch key"] | None = None,
        packed_lengths: Int[Tensor, " sequence"] | None = None,
        positions: Int[Tensor, " time"] | None = None,
        read_at: Int[Tensor, " read"] | None = None,
        audio_mass: HeadReduction | None = None,
        deaf: Deafness | None = None,
        inference_context: StaticInferenceContext | None = None,
    ) -> AudioLLMOutput | Float[Tensor, "time batch hidden"]:
        """Run this stage on `[batch, time]` tokens; every pipeline stage but the last returns hidden states.

        Args:
            tokens: ids; audio placeholders where a clip's frames go.
            audio: distinct clips.
            audio_row: clip of each sequence, or its clips in order, -1 for none; a row is one sequence unless it is
                packed.
            segment_ids: 0 on padding keys of left-padded rows (generation); None means every row is one sequence
                padded, if at all, on the right.
            packed_lengths: lengths of the sequences that fill a single row one after the other; with `positions`,
                those of its groups, prompt and completions together.
            positions: position of each token of a single row in its own sequence, if the row's completions share their
                prompts (`attention.shared`).
            read_at: tokens of each row whose logits and mass are needed; None means all of them.
            audio_mass: head reduction "max" or "mean" to capture the mass; None captures nothing.
            deaf: tokens of these rows that attend to no audio.
            inference_context: Megatron's KV cache for generation.

        Raises:
            ValueError: the frames of a sequence's clips do not exactly fill its placeholders, a sequence is longer than
                the model's positions, or a model with recompute gets deaf tokens with gradient.
        """
        self._refuse_long(tokens.shape[1], packed_lengths, positions)
        read = slice(tokens.shape[1]) if read_at is None else read_at
        tokens, packed_lengths, positions = self._fill_up(tokens, packed_lengths, positions)
        # A rank of a sharded sequence holds a part of the tokens; the output layer gathers them.
        early = None if self.config.sequence_parallel else read_at
        placeholders = tokens == self.audio_token_id
        sequence = _sequence_of_positions(tokens, packed_lengths)
        embeddings = self._embed(tokens, placeholders, sequence, audio, audio_row) if self.pre_process else None
        capture = placeholders if audio_mass is not None else None
        if deaf is not None:
            deaf = self._deafness(deaf, placeholders)
        with self.session.forward(audio_key_mask=capture, positions=positions, read_at=early, deaf=deaf):
            output: Tensor = self.language_model(
                tokens,
                None,
                segment_ids if positions is None else positions[None, None],
                decoder_input=embeddings,
                inference_context=inference_context,
                packed_seq_params=None if positions is not None else _packed_seq_params(packed_lengths),
            )
        if not self.post_process:
            return output
        mass = None
        if audio_mass is not None:
            mass = self.session.audio_mass(audio_mass, head_group=self.tensor_group)[:, read]
        logits = output if early is not None else output[:, read]
        return AudioLLMOutput(logits=self._mask_vocabulary_padding(logits), audio_mass=mass)

    def _deafness(self, deaf: Deafness, placeholders: Bool[Tensor, "batch time"]) -> Deafness:
        """Add the audio keys, and pad to the padded length of the rows."""
        if torch.is_grad_enabled() and self.config.recompute_granularity is not None:
            raise ValueError(
                "deaf tokens would hear again where activation recompute runs a layer in the backward pass: run the "
                "model under torch.no_grad(), or set model.decoder.recompute_granularity=null"
            )
        missing = placeholders.shape[1] - deaf.queries.shape[1]
        keys = placeholders if deaf.audio_keys is None else deaf.audio_keys
        return replace(deaf, queries=F.pad(deaf.queries, (0, missing)), audio_keys=keys)

    def _refuse_long(self, time: int, packed_lengths: Tensor | None, positions: Tensor | None) -> None:
        longest = time if packed_lengths is None else int(packed_lengths.max())
        if positions is not None:
            longest = int(positions.max()) + 1
        if longest > self.max_positions:
            raise ValueError(
                f"rows of {longest} tokens exceed model.decoder.max_position_embeddings={self.max_positions}"
            )

    def prompt_embeddings(
        self, tokens: Int[Tensor, "batch time"], audio: AudioBatch, audio_row: Int[Tensor, " batch *clips"]
    ) -> Float[Tensor, "batch time hidden"]:
        """Input embeddings of right-padded prompts, for an engine that runs the decoder elsewhere.

        Call it without sequence parallelism (`whole_sequences`) on all ranks of the first pipeline stage.
        """
        assert self.pre_process and not self.config.sequence_parallel
        sequence = _sequence_of_positions(tokens, None)
        embedded = self._embed(tokens, tokens == self.audio_token_id, sequence, audio, audio_row)
        return embedded.transpose(0, 1)

    def whole_vocabulary(self, logits: Float[Tensor, "batch shard"]) -> Float[Tensor, "batch vocab"]:
        """Logits of all vocabulary shards side by side, without the padding; no gradient."""
        gathered = logits if self.tensor_group is None else _gather_last_axis(logits, self.tensor_group)
        return gathered[..., : self.vocab_size]

    def rotated_keys(
        self, keys: Float[Tensor, "time batch heads dim"], by: int
    ) -> Float[Tensor, "time batch heads dim"]:
        """Rotated keys of the cache moved by `by` positions; attention depends on differences of positions only."""
        turn: Tensor = self.language_model.rotary_pos_emb(by + 1)[by:]
        rotated: Tensor = apply_rotary_pos_emb(keys, turn.expand(len(keys), -1, -1, -1), config=self.config)
        return rotated

    def _mask_vocabulary_padding(self, logits: Tensor) -> Tensor:
        real = self.vocab_size - self.vocab_start
        if real < logits.shape[-1]:
            # In place: a masked copy would double the largest tensor of the step.
            logits[..., max(real, 0) :] = -torch.inf
        return logits

    def _fill_up(
        self, tokens: Tensor, packed_lengths: Tensor | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Pad rows to a multiple of the number of ranks that a sequence is sharded over; the padding is never read."""
        missing = -tokens.shape[1] % self.config.tensor_model_parallel_size if self.config.sequence_parallel else 0
        if missing == 0:
            return tokens, packed_lengths, positions
        if packed_lengths is not None:
            packed_lengths = torch.cat([packed_lengths, packed_lengths.new_tensor([missing])])
        if positions is not None:
            positions = torch.cat([positions, torch.arange(missing, device=positions.device)])
        return F.pad(tokens, (0, missing), value=self.fill_id), packed_lengths, positions

    def _embed(
        self,
        tokens: Int[Tensor, "batch time"],
        placeholders: Bool[Tensor, "batch time"],
        sequence: Int[Tensor, "batch time"],
        audio: AudioBatch,
        audio_row: Int[Tensor, " sequence *clips"],
    ) -> Float[Tensor, "time batch hidden"]:
        embeddings: Tensor = self.language_model.embedding(input_ids=tokens, position_ids=None)
        if audio.waveforms.shape[0] > 0 and bool(placeholders.any()):
            frames = self.perception(audio.waveforms, audio.lengths)
            wanted = torch.bincount(sequence[placeholders], minlength=len(audio_row))
            filled = _frames_of_sequences(frames, audio_row, wanted)
            by_row = embeddings.transpose(0, 1)
            embeddings = by_row.masked_scatter(placeholders[..., None], filled.to(by_row.dtype)).transpose(0, 1)
        if self.config.sequence_parallel:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings)
        return embeddings.contiguous()


def _embedding_rows(configured: int | None, tokens: int) -> int:
    """Rows of the vocabulary; ValueError if the tokenizer has more tokens."""
    if configured is not None and configured < tokens:
        raise ValueError(
            f"model.decoder.vocab_size={configured} is less than the tokenizer's {tokens} tokens; set it to null, or "
            "to the rows of the model's embedding"
        )
    return configured or tokens


def _frames_of_sequences(
    frames: tuple[Float[Tensor, "audio frames hidden"], Int[Tensor, " audio"]],
    audio_row: Int[Tensor, " sequence *clips"],
    wanted: Int[Tensor, " slots"],
) -> Float[Tensor, "valid hidden"]:
    """Frames in the order in which the sequences' placeholders take them."""
    embeddings, lengths = frames
    clips = audio_row.reshape(len(audio_row), -1)
    wanted = wanted[: len(clips)]
    given = torch.where(clips >= 0, lengths[clips.clamp(min=0)], 0).sum(1)
    wrong = ((wanted != given) & (wanted > 0)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"row {row} has {int(wanted[row])} audio placeholders but its clip gives {int(given[row])} frames"
        )
    rows = clips[wanted > 0]
    rows = rows[rows >= 0]
    valid = torch.arange(embeddings.shape[1], device=lengths.device) < lengths[rows][:, None]
    return embeddings[rows][valid]


def _sequence_of_positions(tokens: Tensor, packed_lengths: Tensor | None) -> Int[Tensor, "batch time"]:
    """Index of the sequence that each position belongs to."""
    if packed_lengths is None:
        return torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
    assert tokens.shape[0] == 1 and int(packed_lengths.sum()) == tokens.shape[1], "a packed row is filled exactly"
    return torch.arange(len(packed_lengths), device=tokens.device).repeat_interleave(packed_lengths)[None]


def _packed_seq_params(lengths: Int[Tensor, " sequence"] | None) -> PackedSeqParams | None:
    if lengths is None:
        return None
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _gather_last_axis(tensor: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
