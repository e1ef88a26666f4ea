"""Qwen's audio encoders as perception: waveforms through the model's own features, encoder and projector."""

import itertools

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemo_mapo.config.model import QwenOmniPerceptionConfig
from nemo_mapo.models.clip_length import too_short
from nemo_mapo.models.projector import Projector


class QwenOmniPerception(nn.Module):
    """The encoder of transformers, with each clip encoded as if it were alone in its batch.

    In transformers the last frames of a clip depend on what else is in the batch: on the end of the longest clip, on
    the padding of the others, and (Qwen3) on clips that attend to each other unless flash attention runs.
    """

    def __init__(self, config: QwenOmniPerceptionConfig, hidden_size: int, sample_rate: int) -> None:
        super().__init__()
        from transformers import WhisperFeatureExtractor

        from nemo_mapo.models.qwen_omni.hf_encoders import build_encoder

        self.features = WhisperFeatureExtractor(**config.features)  # type: ignore[no-untyped-call]
        _check(config, self.features, hidden_size, sample_rate)
        self.family = config.family
        self.whole_frames = config.whole_frames
        # Named `module` as in NeMo's perception, because freezing tells the projector by these names.
        self.module = build_encoder(config)
        self.projector = (
            None if config.projector is None else Projector(config.projector, config.encoder["output_dim"], hidden_size)
        )

    def num_tokens(self, num_samples: int) -> int:
        """Positions after the encoder's convolutions and pooling.

        ValueError if none is left, or for a clip that is longer than Qwen2.5's features take. Qwen3's encoder reads a
        clip of any length in windows.
        """
        if self.family == "qwen2_5_omni" and num_samples > self.features.n_samples:
            seconds = self.features.n_samples / self.features.sampling_rate
            raise ValueError(
                f"a clip of {num_samples} samples is longer than the {seconds:g} s that the model's features take; set "
                f"max_duration={seconds:g} for the split"
            )
        if num_samples < (needed := self._shortest()):
            raise too_short(num_samples, needed, self.features.sampling_rate)
        tokens = self._tokens_of_frames(self._num_frames(num_samples))
        return tokens if self.projector is None else self.projector.num_tokens(tokens)

    def forward(
        self, waveforms: Float[Tensor, "audio samples"], lengths: Int[Tensor, " audio"]
    ) -> tuple[Float[Tensor, "audio frames hidden"], Int[Tensor, " audio"]]:
        """Encode waveforms; see `Perception`. Features are float32, whatever the encoder's type."""
        samples = lengths.tolist()
        for length in samples:
            self.num_tokens(length)
        counts = [self._tokens_of_frames(self._num_frames(length)) for length in samples]
        features = [self._features(waveform[:length]) for waveform, length in zip(waveforms, samples, strict=True)]
        encoded: dict[int, Float[Tensor, "frames hidden"]] = {}
        for rows in self._groups([feature.shape[1] for feature in features]):
            frames = self._encode([features[row] for row in rows])
            parts = torch.split(frames, [counts[row] for row in rows])
            encoded |= dict(zip(rows, parts, strict=True))
        in_order = [encoded[row] for row in range(len(samples))]
        if self.projector is not None:
            in_order = self.projector(in_order)
        counts = [len(frames) for frames in in_order]
        return nn.utils.rnn.pad_sequence(in_order, batch_first=True), torch.tensor(counts, device=lengths.device)

    def _encode(self, features: list[Float[Tensor, "mel _"]]) -> Float[Tensor, "valid hidden"]:
        lengths = torch.tensor([feature.shape[1] for feature in features], device=features[0].device)
        joined = torch.cat(features, dim=1).to(next(self.module.parameters()).dtype)
        encoded: Tensor = self.module(
            joined, feature_lens=lengths, aftercnn_lens=(lengths - 1) // 2 + 1
        ).last_hidden_state
        return encoded

    def _groups(self, num_frames: list[int]) -> list[list[int]]:
        """Rows that go through the encoder together.

        Qwen3's convolutions see the padding after a clip that is shorter than one chunk, so the padding must be what
        the clip would have alone.
        """
        if self.family == "qwen2_5_omni":
            return [list(range(len(num_frames)))]
        together: dict[int, list[int]] = {}
        for row, frames in enumerate(num_frames):
            together.setdefault(min(frames, 2 * self.module.n_window), []).append(row)
        return list(together.values())

    @torch.no_grad()
    def _features(self, waveform: Float[Tensor, " samples"]) -> Float[Tensor, "mel frames"]:
        """The processor's log-mel features of a clip alone.

        Qwen2.5's processor pads clips with zeros to five minutes; zeros for one more window give the same features.
        """
        extractor = self.features
        if self.whole_frames:
            waveform = nn.functional.pad(waveform, (0, -waveform.shape[0] % extractor.hop_length))
        padded = min(waveform.shape[0] + extractor.n_fft + extractor.hop_length, extractor.n_samples)
        padding = {"padding": "max_length", "max_length": padded - padded % extractor.hop_length}
        features = extractor(
            waveform.float().cpu().numpy(),
            sampling_rate=extractor.sampling_rate,
            return_tensors="pt",
            device=str(waveform.device),
            **(padding if self.family == "qwen2_5_omni" else {"padding": True, "truncation": False}),
        )["input_features"][0]
        taken: Tensor = features[:, : self._num_frames(waveform.shape[0])].to(waveform.device)
        return taken

    def _shortest(self) -> int:
        """Samples that give a token; Qwen3's processor does not pad, and its STFT mirrors half a window."""
        hop, mirrored = self.features.hop_length, self.features.n_fft // 2 + 1
        needed = next(n for n in itertools.count(1) if self._tokens_of_frames(self._num_frames(n * hop)) > 0) * hop
        return int(needed - hop + 1) if self.family == "qwen2_5_omni" else max(int(needed), mirrored)

    def _num_frames(self, num_samples: int) -> int:
        """Feature frames that the processor marks as valid."""
        hop: int = self.features.hop_length
        return -(-num_samples // hop) if self.family == "qwen2_5_omni" or self.whole_frames else num_samples // hop

    def _tokens_of_frames(self, frames: int) -> int:
        from nemo_mapo.models.qwen_omni.hf_encoders import tokens_of_frames

        return tokens_of_frames(self.family, frames)


def _check(config: QwenOmniPerceptionConfig, features: object, hidden_size: int, sample_rate: int) -> None:
    """ValueError for a config that mixes models, or would not give a clip the same features twice."""
    if config.projector is None and config.encoder.get("output_dim") != hidden_size:
        raise ValueError(
            f"model.perception.encoder.output_dim={config.encoder.get('output_dim')} but "
            f"model.decoder.hidden_size={hidden_size}; take both from one model"
        )
    rate = config.features.get("sampling_rate", 16000)
    if rate != sample_rate:
        raise ValueError(
            f"model.perception.features.sampling_rate={rate} but data.train_ds.sample_rate={sample_rate}; "
            "make them equal"
        )
    if config.features.get("dither", 0.0) != 0:
        raise ValueError(f"model.perception.features.dither={config.features['dither']}: set it to 0")
    if config.encoder.get("num_mel_bins", 128) != config.features.get("feature_size", 80):
        raise ValueError(
            f"model.perception.encoder.num_mel_bins={config.encoder.get('num_mel_bins')} but "
            f"model.perception.features.feature_size={config.features.get('feature_size')}; take both from one model"
        )
