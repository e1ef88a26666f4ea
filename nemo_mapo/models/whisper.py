"""Whisper's encoder as perception: transformers' features and encoder, and a projector to the decoder's width."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemo_mapo.config.model import WhisperPerceptionConfig
from nemo_mapo.models.clip_length import too_short
from nemo_mapo.models.encoded_clips import EncodedClips
from nemo_mapo.models.projector import Projector

_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop")


class WhisperPerception(nn.Module):
    """The encoder on clips padded with silence to 30 s, as Whisper was trained and as transformers runs it.

    Positions attend to the padding too; those in the padding are dropped afterwards, so that a clip has as many tokens
    as its own length gives. A clip does not depend on its batch. With a frozen encoder (`model.freeze.perception`) a
    clip is encoded once and cached: 30 s of padding cost more than a small decoder.
    """

    def __init__(self, config: WhisperPerceptionConfig, hidden_size: int, sample_rate: int) -> None:
        super().__init__()
        from transformers import WhisperConfig, WhisperFeatureExtractor
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        _check(config, sample_rate)
        self.features = WhisperFeatureExtractor(**config.features)  # type: ignore[no-untyped-call]
        encoder = WhisperConfig(**config.encoder)  # type: ignore[no-untyped-call]
        encoder._attn_implementation = "sdpa"
        if self.features.nb_max_frames != 2 * encoder.max_source_positions:
            raise ValueError(
                f"model.perception: features of {self.features.nb_max_frames} frames, but the encoder takes "
                f"2 * max_source_positions={2 * encoder.max_source_positions}; take both from one model"
            )
        # Named `module` as in the other kinds, because freezing tells the projector by these names.
        self.module = WhisperEncoder(encoder)
        self.projector = Projector(config.projector, encoder.d_model, hidden_size)
        self._clips = EncodedClips(self.module)

    def num_tokens(self, num_samples: int) -> int:
        """Tokens of the clip without its padding; ValueError for one that is empty or longer than Whisper takes."""
        if num_samples > self.features.n_samples:
            seconds = self.features.n_samples / self.features.sampling_rate
            raise ValueError(
                f"a clip of {num_samples} samples is longer than the {seconds:g} s that Whisper's encoder takes; set "
                f"max_duration={seconds:g} for the split"
            )
        if num_samples < 1:
            raise too_short(num_samples, 1, self.features.sampling_rate)
        return self.projector.num_tokens(self._num_positions(num_samples))

    def forward(
        self, waveforms: Float[Tensor, "audio samples"], lengths: Int[Tensor, " audio"]
    ) -> tuple[Float[Tensor, "audio frames hidden"], Int[Tensor, " audio"]]:
        """Encode waveforms; see `Perception`. Features are float32, whatever the encoder's type."""
        samples = lengths.tolist()
        counts = [self.num_tokens(length) for length in samples]
        alone = [waveform[:length] for waveform, length in zip(waveforms, samples, strict=True)]
        if self._clips.frozen:
            clips = [self._clips.encoded(waveform, lambda one: self._encode([one])[0]) for waveform in alone]
        else:
            clips = self._encode(alone)
        projected = self.projector(clips)
        return nn.utils.rnn.pad_sequence(projected, batch_first=True), torch.tensor(counts, device=lengths.device)

    def _encode(self, waveforms: list[Tensor]) -> list[Float[Tensor, "_ width"]]:
        """The encoder's positions of each clip, without those of the padding."""
        features = torch.stack([self._features(waveform) for waveform in waveforms])
        encoded = self.module(features.to(self.module.conv1.weight.dtype)).last_hidden_state
        return [frames[: self._num_positions(len(one))] for frames, one in zip(encoded, waveforms, strict=True)]

    @torch.no_grad()
    def _features(self, waveform: Float[Tensor, " samples"]) -> Float[Tensor, "mel frames"]:
        made = self.features(
            waveform.float().cpu().numpy(),
            sampling_rate=self.features.sampling_rate,
            return_tensors="pt",
            device=str(waveform.device),
        )
        features: Tensor = made["input_features"][0].to(waveform.device)
        return features

    def _num_positions(self, num_samples: int) -> int:
        """Positions with audio after the encoder's convolutions, the second of which halves the frames."""
        frames = -(-num_samples // self.features.hop_length)
        positions: int = -(-frames // 2)
        return positions


def _check(config: WhisperPerceptionConfig, sample_rate: int) -> None:
    """ValueError for a config that mixes models, or would not give a clip the same features twice."""
    rate = config.features.get("sampling_rate", 16000)
    if rate != sample_rate:
        raise ValueError(
            f"model.perception.features.sampling_rate={rate} but data.train_ds.sample_rate={sample_rate}; "
            "make them equal"
        )
    random = [f"encoder.{name}={config.encoder[name]}" for name in _DROPOUTS if config.encoder.get(name, 0) != 0]
    if config.features.get("dither", 0.0) != 0:
        random.append(f"features.dither={config.features['dither']}")
    if random:
        raise ValueError(
            f"model.perception.{', '.join(random)}: set it to 0, or a clip would sound different each time"
        )
    bins, features = config.encoder.get("num_mel_bins", 80), config.features.get("feature_size", 80)
    if bins != features:
        raise ValueError(
            f"model.perception.encoder.num_mel_bins={bins} but model.perception.features.feature_size={features}; take "
            "both from one model"
        )
