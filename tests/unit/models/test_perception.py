"""Encoders: the number of tokens is a function of samples, and padding does not leak into a clip."""

import re

import pytest
import torch

from nemo_mapo.config.model import ConvPerceptionConfig, NemoPerceptionConfig
from nemo_mapo.models.perception import ConvPerception, build_perception

SAMPLE_RATE = 16000
HIDDEN = 32


def nemo_module_config() -> dict[str, object]:
    """A small FastConformer perception module, in NeMo's own terms."""
    encoder = {
        "_target_": "nemo.collections.asr.modules.ConformerEncoder",
        "feat_in": 40,
        "feat_out": -1,
        "n_layers": 1,
        "d_model": 16,
        "subsampling": "dw_striding",
        "subsampling_factor": 4,
        "subsampling_conv_channels": 8,
        "n_heads": 2,
        "conv_kernel_size": 5,
        "conv_norm_type": "layer_norm",
        "dropout": 0.0,
        "dropout_pre_encoder": 0.0,
        "dropout_emb": 0.0,
        "dropout_att": 0.0,
    }
    return {
        "preprocessor": {
            "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
            "sample_rate": SAMPLE_RATE,
            "features": 40,
            "dither": 0.0,
            "pad_to": 0,
        },
        "encoder": encoder,
        "modality_adapter": {
            "_target_": "nemo.collections.multimodal.speech_llm.modules.modality_adapters.IdentityConnectors",
            "d_model": 16,
        },
    }


@pytest.fixture(scope="module", params=["conv", "nemo"])
def encoder(request):
    config = ConvPerceptionConfig() if request.param == "conv" else NemoPerceptionConfig(module=nemo_module_config())
    torch.manual_seed(0)
    return build_perception(config, HIDDEN, SAMPLE_RATE).eval()


@torch.no_grad()
@pytest.mark.parametrize("samples", [4000, 8123, 15999, 16000, 16001, 32000])
def test_the_encoder_gives_as_many_frames_as_it_promises(encoder, samples):
    embeddings, lengths = encoder(torch.randn(1, samples) * 0.1, torch.tensor([samples]))
    assert int(lengths[0]) == encoder.num_tokens(samples)
    assert embeddings.shape[1] >= int(lengths[0])
    assert embeddings.shape[2] == HIDDEN


@torch.no_grad()
def test_a_clip_is_encoded_the_same_alone_and_in_a_padded_batch(encoder):
    lengths = torch.tensor([32000, 20000])
    waveforms = torch.randn(2, 32000) * 0.1 * (torch.arange(32000) < lengths[:, None])
    together, frames = encoder(waveforms, lengths)
    alone, _ = encoder(waveforms[1:, :20000], lengths[1:])
    valid = int(frames[1])
    torch.testing.assert_close(together[1, :valid], alone[0, :valid], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 100, 160, 256, 257, 320, 400, 512, 640, 800, 1600])
def test_a_short_clip_is_encoded_alone_or_refused_with_the_length_needed(encoder, samples):
    try:
        promised = encoder.num_tokens(samples)
    except ValueError as error:
        needed = int(re.search(r"shorter than the (\d+) ", str(error)).group(1))
        assert samples < needed <= 1600 and encoder.num_tokens(needed) > 0
        return
    _, lengths = encoder(torch.randn(1, samples) * 0.1, torch.tensor([samples]))
    assert int(lengths[0]) == promised > 0


def test_more_than_half_a_transform_is_the_shortest_clip(encoder):
    preprocessor = encoder.preprocessor if isinstance(encoder, ConvPerception) else encoder.module.preprocessor
    half = preprocessor.featurizer.n_fft // 2
    with pytest.raises(ValueError, match=rf"a clip of {half} samples is shorter than the {half + 1} \("):
        encoder.num_tokens(half)
    assert encoder.num_tokens(half + 1) > 0


def test_two_seconds_become_25_tokens_of_the_embedded_encoder():
    assert ConvPerception(ConvPerceptionConfig(), HIDDEN, SAMPLE_RATE).num_tokens(2 * SAMPLE_RATE) == 25
