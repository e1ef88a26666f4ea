"""Perception: waveform in, embeddings of the decoder's width out, one per audio placeholder token."""

import math
from contextlib import nullcontext
from itertools import count, pairwise
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor
from nemo.collections.asr.parts.preprocessing.features import FilterbankFeatures
from torch import Tensor, nn

from nemo_mapo.config.model import (
    ConvPerceptionConfig,
    NemoPerceptionConfig,
    PerceptionConfig,
    QwenOmniPerceptionConfig,
    WhisperPerceptionConfig,
)
from nemo_mapo.models.clip_length import too_short
from nemo_mapo.models.nemo_files import refuse_foreign_classes
from nemo_mapo.models.qwen_omni.encoder import QwenOmniPerception
from nemo_mapo.models.whisper import WhisperPerception
from nemo_mapo.upstream.nemo import NewerFeatures, as_installed, compute_features, perception_class

_MEL_FLOOR_OFFSET = 4.0
_MEL_SCALE = 4.0
"""Log-mel energies of 16-bit audio lie in about [-16, 4]; these bring them near [-3, 2]."""


class Perception(Protocol):
    """What the audio LLM requires of an encoder."""

    def __call__(
        self, waveforms: Float[Tensor, "audio samples"], lengths: Int[Tensor, " audio"]
    ) -> tuple[Float[Tensor, "audio frames hidden"], Int[Tensor, " audio"]]:
        """Encode; returns embeddings and the number of valid frames of each row."""
        ...

    def num_tokens(self, num_samples: int) -> int:
        """Placeholder tokens that a clip of `num_samples` samples fills."""
        ...


class ConvPerception(nn.Module):
    """Log-mel features (NeMo's preprocessor), stride-2 convolutions, projection.

    A token covers hop_seconds * downsampling seconds. Frames past a clip's end are zeroed before each
    convolution, so a clip's embeddings do not depend on the padding of its batch.
    """

    def __init__(self, config: ConvPerceptionConfig, hidden_size: int, sample_rate: int) -> None:
        super().__init__()
        self.sample_rate = sample_rate
        self.hop_samples = round(config.hop_seconds * sample_rate)
        self.preprocessor = AudioToMelSpectrogramPreprocessor(
            sample_rate=sample_rate,
            window_size=config.window_seconds,
            window_stride=config.hop_seconds,
            features=config.mel_bins,
            normalize=None,
            dither=0.0,
            pad_to=0,
            log=True,
        )
        compute_features(self.preprocessor.featurizer, "nemo_2_3")
        widths = [config.mel_bins] + [config.channels] * int(math.log2(config.downsampling))
        self.convolutions = nn.ModuleList(
            nn.Conv1d(fan_in, fan_out, kernel_size=3, stride=2, padding=1) for fan_in, fan_out in pairwise(widths)
        )
        self.context = nn.Conv1d(widths[-1], config.channels, kernel_size=3, padding=1)
        self.projection = nn.Sequential(nn.LayerNorm(config.channels), nn.Linear(config.channels, hidden_size))

    def num_tokens(self, num_samples: int) -> int:
        """Frames of the preprocessor, halved (rounding up) by each convolution.

        Raises:
            ValueError: the clip is shorter than half a window of the Fourier transform, which mirrors that much of it.
        """
        if num_samples < (needed := shortest_clip(self.preprocessor.featurizer)):
            raise too_short(num_samples, needed, self.sample_rate)
        frames = num_samples // self.hop_samples
        for _ in self.convolutions:
            frames = (frames + 1) // 2
        return frames

    def forward(
        self, waveforms: Float[Tensor, "audio samples"], lengths: Int[Tensor, " audio"]
    ) -> tuple[Float[Tensor, "audio frames hidden"], Int[Tensor, " audio"]]:
        """Encode waveforms; see `Perception`."""
        with torch.no_grad():
            features, _ = self.preprocessor(input_signal=waveforms.to(self.context.weight.dtype), length=lengths)
        frame_lengths = lengths // self.hop_samples
        features = (features[..., : int(frame_lengths.max())] + _MEL_FLOOR_OFFSET) / _MEL_SCALE
        features = features.to(self.context.weight.dtype)
        for convolution in self.convolutions:
            features = nn.functional.gelu(convolution(_zero_past_end(features, frame_lengths)))
            frame_lengths = (frame_lengths + 1) // 2
        features = nn.functional.gelu(self.context(_zero_past_end(features, frame_lengths)))
        return self.projection(features.transpose(1, 2)), frame_lengths


def shortest_clip(featurizer: FilterbankFeatures) -> int:
    """Samples that NeMo's features need: torch mirrors that much of a clip at its ends, unless it pads with zeros."""
    if featurizer.exact_pad:
        return int(featurizer.stft_pad_amount) + 1
    return 1 if isinstance(featurizer, NewerFeatures) else int(featurizer.n_fft) // 2 + 1


def _zero_past_end(
    features: Float[Tensor, "audio channels frames"], lengths: Int[Tensor, " audio"]
) -> Float[Tensor, "audio channels frames"]:
    valid = torch.arange(features.shape[-1], device=features.device) < lengths[:, None]
    return features * valid[:, None]


class NemoPerception(nn.Module):
    """NeMo's own AudioPerceptionModule, with the number of output tokens as a function of samples."""

    def __init__(self, config: NemoPerceptionConfig, hidden_size: int) -> None:
        super().__init__()
        from omegaconf import OmegaConf

        _refuse_randomness(config.module)
        installed = as_installed(config.module)
        module_config = OmegaConf.create(installed)
        module_config.output_dim = hidden_size
        refuse_foreign_classes(installed, "model.perception.module")
        # NeMo's encoders read tensor values while they are built; tensors without storage have none.
        without_storage = torch.get_default_device().type == "meta"
        with torch.device("cpu") if without_storage else nullcontext():
            self.module = perception_class()(module_config)
        self._tokens: dict[int, int] = {}
        self._sample_rate = int(config.module["preprocessor"]["sample_rate"])
        self._trims = config.features == "nemo_2_5"
        compute_features(self.module.preprocessor.featurizer, config.features)

    def train(self, mode: bool = True) -> "NemoPerception":
        """Switch as usual, but batch norms keep their statistics, or a clip would depend on its batch."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self

    def num_tokens(self, num_samples: int) -> int:
        """Length that the module itself reports for a clip of this many samples (measured once, on silence).

        Raises:
            ValueError: the clip is shorter than the module can take, or gives no token.
        """
        featurizer = self.module.preprocessor.featurizer
        shortest = shortest_clip(featurizer)
        if num_samples < shortest or not self._measured(num_samples):
            tried = count(max(num_samples, shortest), featurizer.hop_length)
            raise too_short(num_samples, next(n for n in tried if self._measured(n)), self._sample_rate)
        return self._measured(num_samples)

    def _measured(self, num_samples: int) -> int:
        if num_samples not in self._tokens:
            was_training = self.module.training
            self.module.eval()
            parameter = next(self.module.parameters())
            silence = torch.zeros(1, num_samples, device=parameter.device)
            with torch.no_grad():
                _, lengths = self._encode(silence, torch.tensor([num_samples], device=parameter.device))
            self.module.train(was_training)
            self._tokens[num_samples] = int(lengths[0])
        return self._tokens[num_samples]

    def forward(
        self, waveforms: Float[Tensor, "audio samples"], lengths: Int[Tensor, " audio"]
    ) -> tuple[Float[Tensor, "audio frames hidden"], Int[Tensor, " audio"]]:
        """Encode waveforms; see `Perception`.

        Only clips of equal length are encoded together: NeMo's subsampling lets padding leak into the last frames, so a
        clip would sound different in another batch.
        """
        waveforms = waveforms.to(next(self.module.parameters()).dtype)
        encoded: dict[int, Float[Tensor, "frames hidden"]] = {}
        for samples in sorted(set(lengths.tolist())):
            rows = (lengths == samples).nonzero().flatten()
            frames, counts = self._encode(waveforms[rows, :samples], lengths[rows])
            encoded |= {int(row): frames[i, : int(counts[i])] for i, row in enumerate(rows)}
        in_order = [encoded[row] for row in range(len(lengths))]
        frame_lengths = torch.tensor([len(frames) for frames in in_order], device=lengths.device)
        return nn.utils.rnn.pad_sequence(in_order, batch_first=True), frame_lengths

    def _encode(
        self, waveforms: Float[Tensor, "same samples"], lengths: Int[Tensor, " same"]
    ) -> tuple[Float[Tensor, "same frames hidden"], Int[Tensor, " same"]]:
        """Encode clips of equal length with NeMo's module."""
        if not self._trims:
            encoded: tuple[Tensor, Tensor] = self.module(input_signal=waveforms, input_signal_length=lengths)
            return encoded
        features, frames = self.module.preprocessor(input_signal=waveforms, length=lengths)
        # NeMo 2.5 masks the frames past a clip's end before each convolution; here there are none.
        encoded = self.module(processed_signal=features[..., : int(frames.max())], processed_signal_length=frames)
        return encoded


def _refuse_randomness(module: dict[str, Any]) -> None:
    """ValueError naming what would make a clip sound different from pass to pass, or from batch to batch.

    Log-probabilities of rollout, reference and training must come from the same function.
    """
    encoder, adapter = module.get("encoder", {}), module.get("modality_adapter", {})
    conformers = {"encoder": encoder}
    if "ConformerEncoder" in adapter.get("_target_", ""):
        conformers["modality_adapter"] = adapter
    wrong = [
        f"{part}.{key}={values.get(key, 'its default, above 0')}: set it to 0"
        for part, values in conformers.items()
        for key in ("dropout", "dropout_pre_encoder", "dropout_emb", "dropout_att")
        if values.get(key) != 0
    ]
    if encoder.get("stochastic_depth_drop_prob", 0.0) != 0:
        wrong.append("encoder.stochastic_depth_drop_prob is above 0: leave it out")
    contexts = encoder.get("att_context_size")
    if contexts and not isinstance(contexts[0], int) and len(contexts) > 1:
        wrong.append(f"encoder.att_context_size={contexts} would be drawn from at random: name one")
    if module.get("spec_augment") is not None:
        wrong.append("spec_augment is set: leave it out")
    if module.get("preprocessor", {}).get("dither") != 0:
        wrong.append("preprocessor.dither is not 0: set it to 0")
    if wrong:
        raise ValueError("model.perception.module: " + "; ".join(wrong))


def build_perception(
    config: PerceptionConfig, hidden_size: int, sample_rate: int
) -> ConvPerception | NemoPerception | QwenOmniPerception | WhisperPerception:
    """Build the encoder that the config names."""
    if isinstance(config, WhisperPerceptionConfig):
        return WhisperPerception(config, hidden_size, sample_rate)
    if isinstance(config, QwenOmniPerceptionConfig):
        return QwenOmniPerception(config, hidden_size, sample_rate)
    if isinstance(config, NemoPerceptionConfig):
        rate = config.module.get("preprocessor", {}).get("sample_rate")
        if rate != sample_rate:
            raise ValueError(
                f"model.perception.module.preprocessor.sample_rate={rate} but data.train_ds.sample_rate={sample_rate}; "
                "make them equal"
            )
        return NemoPerception(config, hidden_size)
    return ConvPerception(config, hidden_size, sample_rate)
