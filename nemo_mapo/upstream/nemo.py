"""NeMo 2.3 and 3.0: where the perception module lives, what its parts are called, and which mel features are computed.

It is in `multimodal.speech_llm` of 2.3, and only in `speechlm2` of 3.0.
"""

from typing import Any, Final, Literal

import nemo
import torch
from jaxtyping import Float, Int
from nemo.collections.asr.parts.preprocessing.features import FilterbankFeatures
from packaging.version import Version
from torch import Tensor

Features = Literal["nemo_2_3", "nemo_2_5"]
"""Mel features as NeMo computes them up to 2.3 and since 2.5."""
_OLD: Final = "nemo.collections.multimodal.speech_llm.modules."
_NEW: Final = "nemo.collections.speechlm2.modules.perception."
IDENTITY_ADAPTER: Final = f"{_OLD}modality_adapters.IdentityConnectors"
"""The adapter that passes frames on unchanged; configs use this name whichever NeMo is installed."""
POOLING_ADAPTERS: Final = (
    f"{_OLD}PoolingMLPConnectors",
    f"{_OLD}modality_adapters.PoolingMLPConnectors",
)
"""The adapter that pools frames, which only NeMo up to 2.3 has."""
NEWER_IDENTITY_ADAPTER: Final = f"{_NEW}IdentityConnector"


def features_of(version: str) -> Features:
    """The mel features of a release of NeMo: `features_of("2.3.3")` is "nemo_2_3"."""
    return "nemo_2_3" if Version(version).release < (2, 5) else "nemo_2_5"


_INSTALLED: Final = features_of(nemo.__version__)


def perception_class() -> Any:
    """NeMo's AudioPerceptionModule, imported on the first call."""
    try:
        from nemo.collections.multimodal.speech_llm.modules.perception_modules import AudioPerceptionModule
    except ModuleNotFoundError:
        from nemo.collections.speechlm2.modules.perception import AudioPerceptionModule
    return AudioPerceptionModule


def as_installed(module: dict[str, Any]) -> dict[str, Any]:
    """A perception module's config, with its adapter named as in the installed NeMo."""
    adapter = module.get("modality_adapter", {})
    if adapter.get("_target_") not in (IDENTITY_ADAPTER, NEWER_IDENTITY_ADAPTER):
        return module
    new = perception_class().__module__.startswith("nemo.collections.speechlm2.")
    return {
        **module,
        "modality_adapter": {**adapter, "_target_": NEWER_IDENTITY_ADAPTER if new else IDENTITY_ADAPTER},
    }


class OlderFeatures(FilterbankFeatures):  # type: ignore[misc]
    """Mel features as in NeMo up to 2.3, whichever is installed: clips are padded with their mirrored edges."""

    pad_mode = "reflect"
    extra_frames = 1

    def stft(self, x: Float[Tensor, "audio samples"]) -> Tensor:
        """The spectrum of each window."""
        spectrum: Tensor = torch.stft(
            x,
            n_fft=self.n_fft,
            hop_length=self.hop_length,
            win_length=self.win_length,
            center=not self.exact_pad,
            window=self.window.to(dtype=torch.float),
            return_complex=True,
            pad_mode=self.pad_mode,
        )
        return spectrum

    def get_seq_len(self, seq_len: Int[Tensor, " audio"]) -> Int[Tensor, " audio"]:
        """Number of frames of clips with these numbers of samples."""
        padding = 2 * self.stft_pad_amount if self.stft_pad_amount is not None else self.n_fft // 2 * 2
        whole = torch.floor_divide(seq_len + padding - self.n_fft, self.hop_length) + self.extra_frames
        return whole.to(dtype=torch.long)


class NewerFeatures(OlderFeatures):
    """Mel features as in NeMo since 2.5: clips are padded with zeros, and have one frame fewer."""

    pad_mode = "constant"
    extra_frames = 0


def compute_features(featurizer: FilterbankFeatures, features: Features) -> None:
    """Make the featurizer of a NeMo preprocessor compute these features.

    Raises:
        ValueError: `exact_pad` with features other than those of the installed NeMo.
    """
    if not featurizer.exact_pad:
        # In place: NeMo builds only its own features.
        featurizer.__class__ = OlderFeatures if features == "nemo_2_3" else NewerFeatures
    elif features != _INSTALLED:
        raise ValueError(
            f"model.perception.module.preprocessor.exact_pad: the installed NeMo {nemo.__version__} computes "
            f"model.perception.features={_INSTALLED}, not {features}"
        )
