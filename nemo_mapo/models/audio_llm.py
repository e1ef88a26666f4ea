"""The audio language model: perception, then a Megatron-core decoder reading audio as placeholder tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from nemo_mapo.attention.session import AttentionSession, HeadReduction
from nemo_mapo.config.model import ModelConfig
from nemo_mapo.models.decoder import build_decoder
from nemo_mapo.models.perception import build_perception
from nemo_mapo.types import AudioBatch


@dataclass(frozen=True, kw_only=True)
class AudioLLMOutput:
    """Logits of one forward pass and, when asked for, the audio attention mass of every query."""

    logits: Float[Tensor, "batch time vocab"]
    audio_mass: Float[Tensor, "batch time"] | None
    """a: mean over target layers of the maximum (or mean) over heads; differentiable."""


class AudioLLM(MegatronModule):  # type: ignore[misc]
    """Perception + decoder.

    Token index = position everywhere. Embeddings of the placeholder tokens are replaced, in order, by the valid
    frames of the row's audio clip.
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
        decoder = build_decoder(config.decoder, vocab_size=vocab_size, session=self.session, params_dtype=params_dtype)
        super().__init__(config=decoder.config)
        self.decoder = decoder
        self.perception = build_perception(config.perception, config.decoder.hidden_size, sample_rate)
        self.audio_token_id = audio_token_id
        self.max_positions = config.decoder.max_position_embeddings

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        audio: AudioBatch,
        audio_row: Int[Tensor, " batch"],
        *,
        segment_ids: Int[Tensor, "batch key"] | None = None,
        audio_mass: HeadReduction | None = None,
        inference_context: StaticInferenceContext | None = None,
    ) -> AudioLLMOutput:
        """Run the model on `[batch, time]` tokens.

        Args:
            tokens: ids; audio placeholders where a clip's frames go.
            audio: distinct clips.
            audio_row: clip of each row, -1 for none.
            segment_ids: sequence of each key (0 is padding) for left-padded or packed rows; None means every
                row is one sequence padded, if at all, on the right.
            audio_mass: head reduction "max" or "mean" to capture the mass; None captures nothing.
            inference_context: Megatron's KV cache for generation.

        Raises:
            ValueError: if the frames of a row's clip do not fill exactly its placeholders, or a row is longer
                than the model's positions.
        """
        if tokens.shape[1] > self.max_positions:
            raise ValueError(
                f"rows of {tokens.shape[1]} tokens exceed model.decoder.max_position_embeddings={self.max_positions}"
            )
        placeholders = tokens == self.audio_token_id
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        embeddings = self._embed(tokens, positions, placeholders, audio, audio_row)
        capture = placeholders if audio_mass is not None else None
        with self.session.forward(segment_ids=segment_ids, audio_key_mask=capture):
            logits = self.decoder(
                tokens, positions, None, decoder_input=embeddings, inference_context=inference_context
            )
            mass = self.session.audio_mass(audio_mass) if audio_mass is not None else None
        return AudioLLMOutput(logits=logits, audio_mass=mass)

    def _embed(
        self,
        tokens: Int[Tensor, "batch time"],
        positions: Int[Tensor, "batch time"],
        placeholders: Bool[Tensor, "batch time"],
        audio: AudioBatch,
        audio_row: Int[Tensor, " batch"],
    ) -> Float[Tensor, "time batch hidden"]:
        embeddings: Tensor = self.decoder.embedding(input_ids=tokens, position_ids=positions)
        if audio.waveforms.shape[0] == 0 or not bool(placeholders.any()):
            return embeddings
        frames = self.perception(audio.waveforms, audio.lengths)
        filled = self._frames_of_rows(frames, audio_row, placeholders)
        by_row = embeddings.transpose(0, 1)
        return by_row.masked_scatter(placeholders[..., None], filled.to(by_row.dtype)).transpose(0, 1).contiguous()

    def _frames_of_rows(
        self,
        frames: tuple[Float[Tensor, "audio frames hidden"], Int[Tensor, " audio"]],
        audio_row: Int[Tensor, " batch"],
        placeholders: Bool[Tensor, "batch time"],
    ) -> Float[Tensor, "valid hidden"]:
        """Frames in the order in which the rows' placeholders take them."""
        embeddings, lengths = frames
        has_audio = audio_row >= 0
        wanted = placeholders.sum(dim=1)
        given = torch.where(has_audio, lengths[audio_row.clamp(min=0)], 0)
        wrong = ((wanted != given) & (wanted > 0)).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"row {row} has {int(wanted[row])} audio placeholders but its clip gives {int(given[row])} frames"
            )
        rows = audio_row[wanted > 0]
        valid = torch.arange(embeddings.shape[1], device=lengths.device) < lengths[rows][:, None]
        return embeddings[rows][valid]
