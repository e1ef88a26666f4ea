"""The encoder of an ASR model that NeMo has saved: in, trained with, and out again for NeMo to load."""

import math

import pytest
import torch
from integration.parts_tiny import load_policy, save_chat_model
from nemo.collections.asr.models import ASRModel, EncDecCTCModel
from omegaconf import OmegaConf

from forked_commands import run
from nemo_mapo.config.model import NemoPerceptionConfig
from nemo_mapo.models.encoders import load_weights, read_any_encoder
from nemo_mapo.models.nemo_encoder import load_encoder, perception_config, save_encoder
from nemo_mapo.models.perception import build_perception
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.training.assemble import assemble
from nemo_mapo.upstream.nemo import perception_class
from tests.integration.tiny_run import command, metrics, write_tiny_corpus

pytestmark = pytest.mark.integration

SAMPLE_RATE, HIDDEN = 16000, 32
LETTERS = list("abc ")
SAMPLES = 20480


def asr_config(**encoder):
    return OmegaConf.create(
        {
            "sample_rate": SAMPLE_RATE,
            "labels": LETTERS,
            "preprocessor": {
                "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
                "sample_rate": SAMPLE_RATE,
                "features": 40,
                "normalize": "per_feature",
                "dither": 1e-5,
                "pad_to": 16,
            },
            "spec_augment": {"_target_": "nemo.collections.asr.modules.SpectrogramAugmentation", "time_masks": 2},
            "encoder": {
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
                "conv_norm_type": "batch_norm",
                "dropout": 0.1,
                **encoder,
            },
            "decoder": {
                "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
                "feat_in": 16,
                "num_classes": len(LETTERS),
                "vocabulary": LETTERS,
            },
        }
    )


@pytest.fixture(scope="module")
def asr(tmp_path_factory):
    """A .nemo file with random weights and random statistics of its batch norm."""
    install_cpu_host()
    torch.manual_seed(3)
    model = EncDecCTCModel(cfg=asr_config())
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    path = tmp_path_factory.mktemp("asr") / "tiny.nemo"
    model.save_to(str(path))
    return path


@pytest.fixture(scope="module")
def perception(asr):
    torch.manual_seed(0)
    built = build_perception(perception_config(asr), HIDDEN, SAMPLE_RATE)
    load_encoder(built, asr)
    return built


def clips():
    return torch.randn(2, SAMPLES, generator=torch.Generator().manual_seed(1)) * 0.1


@pytest.mark.parametrize(("projector", "stack"), [("linear", None), ("adapter", 2)])
@torch.no_grad()
def test_an_audio_llm_from_parts_takes_it_with_its_weights(asr, perception, projector, stack, tmp_path):
    encoder = read_any_encoder(asr, projector=projector, stack=stack)
    built = build_perception(encoder.perception, HIDDEN, encoder.sample_rate)
    load_weights(built, encoder)
    own, theirs = built.module.state_dict(), perception.module.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in theirs if name.startswith("encoder."))
    frames, counts = built(clips(), torch.tensor([SAMPLES] * 2))
    whole = {"nemo_2_3": 33, "nemo_2_5": 32}[encoder.perception.features]
    # A striding convolution rounds up.
    assert counts.tolist() == [built.num_tokens(SAMPLES)] * 2 == [math.ceil(whole / (stack or 1))] * 2
    assert frames.shape[2] == HIDDEN
    initialize_parallel()
    save_chat_model(tmp_path / "llama")
    assemble(encoder, tmp_path / "llama", tmp_path / "policy", seed=0)
    own = load_policy(tmp_path / "policy", tmp_path / "policy" / "checkpoint").perception.module.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in theirs if name.startswith("encoder."))


@torch.no_grad()
def encoded_by(model):
    """What NeMo's own preprocessor and encoder make of the clips; its dither is noise, and off."""
    model.eval()
    model.preprocessor.featurizer.dither = 0.0
    features, lengths = model.preprocessor(input_signal=clips(), length=torch.tensor([SAMPLES] * 2))
    frames, counts = model.encoder(audio_signal=features, length=lengths)
    return frames[:, :, : int(counts.max())]


@torch.no_grad()
def test_the_encoder_computes_what_the_asr_models_does_in_evaluation_and_in_training(asr, perception):
    wanted = encoded_by(ASRModel.restore_from(str(asr), map_location="cpu"))
    for training in (False, True):
        perception.train(training)
        frames = encoded_by_module(perception.module)
        torch.testing.assert_close(frames, wanted, rtol=0, atol=1e-6)
    assert frames.shape[2] == perception.num_tokens(SAMPLES)


@torch.no_grad()
def encoded_by_module(module):
    features, lengths = module.preprocessor(input_signal=clips(), length=torch.tensor([SAMPLES] * 2))
    frames, counts = module.encoder(audio_signal=features, length=lengths)
    return frames[:, :, : int(counts.max())]


@pytest.mark.parametrize("samples", [4000, 8123, 16000, 16001])
def test_frames_are_a_function_of_samples(perception, samples):
    with torch.no_grad():
        _, lengths = perception.eval()(torch.randn(1, samples) * 0.1, torch.tensor([samples]))
    assert int(lengths[0]) == perception.num_tokens(samples)


def test_weights_come_in_bit_for_bit(asr, perception):
    theirs = ASRModel.restore_from(str(asr), map_location="cpu").state_dict()
    mine = perception.module.state_dict()
    shared = [name for name in theirs if name.startswith(("encoder.", "preprocessor."))]
    assert shared and all(torch.equal(mine[name], theirs[name]) for name in shared)


def test_another_models_encoder_is_refused_by_the_name_of_a_tensor(tmp_path, perception):
    EncDecCTCModel(cfg=asr_config(conv_kernel_size=7)).save_to(str(tmp_path / "other.nemo"))
    with pytest.raises(ValueError, match=r"other.nemo: encoder.layers.0.conv.depthwise_conv.weight"):
        load_encoder(perception, tmp_path / "other.nemo")


def test_what_nemo_draws_at_random_in_training_is_fixed(tmp_path):
    random = {"att_context_size": [[4, 4], [2, 2]], "stochastic_depth_drop_prob": 0.3}
    EncDecCTCModel(cfg=asr_config(**random)).save_to(str(tmp_path / "random.nemo"))
    config = perception_config(tmp_path / "random.nemo")
    encoder = config.module["encoder"]
    assert encoder["att_context_size"] == [4, 4] and "stochastic_depth_drop_prob" not in encoder
    built = build_perception(config, HIDDEN, SAMPLE_RATE).train()
    with torch.no_grad():
        assert len({float(encoded_by_module(built.module).sum()) for _ in range(4)}) == 1
    for key, value in random.items():
        section = {**config.module, "encoder": {**encoder, key: value}}
        with pytest.raises(ValueError, match=f"encoder.{key}"):
            build_perception(NemoPerceptionConfig(module=section), HIDDEN, SAMPLE_RATE)


def test_anything_but_an_asr_model_is_refused(tmp_path):
    (tmp_path / "text.nemo").write_text("not an archive")
    with pytest.raises(ValueError, match=r"text.nemo is not a .nemo file"):
        perception_config(tmp_path / "text.nemo")
    with pytest.raises(ValueError, match=r"absent.nemo: no such file"):
        perception_config(tmp_path / "absent.nemo")


@torch.no_grad()
def test_nemo_loads_what_is_saved_and_computes_the_same(asr, perception, tmp_path):
    perception.eval()
    save_encoder(perception, asr, tmp_path / "out")
    again = ASRModel.restore_from(str(tmp_path / "out" / "asr.nemo"), map_location="cpu")
    assert torch.equal(encoded_by(again), encoded_by(ASRModel.restore_from(str(asr), map_location="cpu")))
    module = perception_class()(OmegaConf.load(tmp_path / "out" / "perception.yaml"))
    module.load_state_dict(torch.load(tmp_path / "out" / "perception.pt"))
    lengths = torch.tensor([SAMPLES] * 2)
    frames, _ = module.eval()(input_signal=clips(), input_signal_length=lengths)
    assert torch.equal(frames, perception.module(input_signal=clips(), input_signal_length=lengths)[0])
    with pytest.raises(ValueError, match="already exists"):
        save_encoder(perception, asr, tmp_path / "out")


def test_a_run_starts_from_the_encoder_and_gives_it_back_changed(asr, tmp_path):
    corpus, run_dir = write_tiny_corpus(tmp_path / "corpus"), tmp_path / "run"
    imported = run("import_nemo_encoder.py", "--asr", asr, "--output", tmp_path / "imported")
    assert imported.returncode == 0, imported.stderr
    # A run that follows the advice needs a start beside the encoder.
    assert "model/perception=imported '~warm_start'" in imported.stdout
    assert "pretrained_checkpoint.restore_from_path=RUN/checkpoints/step_N" in imported.stdout
    overrides = [item for item in command(corpus, run_dir)[2:] if not item.startswith("model.perception")]
    finished = run(
        "train_mapo.py",
        *("--config-dir", tmp_path / "imported" / "conf", "model/perception=imported"),
        *overrides,
        *("trainer.mapo.max_steps=2", "model.optim.lr=1e-3", "data.test_ds=null"),
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert all(record["rollout/log_prob_gap"] < 1e-3 for record in metrics(run_dir)[1:])
    exported = run("export_nemo_encoder.py", run_dir, "--output", tmp_path / "exported")
    assert exported.returncode == 0, exported.stderr[-3000:]
    before = ASRModel.restore_from(str(asr), map_location="cpu").state_dict()
    after = ASRModel.restore_from(str(tmp_path / "exported" / "asr.nemo"), map_location="cpu").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("encoder.layers") for name in moved)
    # Statistics are kept, and the ASR model's own decoder is not ours to change.
    assert not any(name.startswith("decoder.") or "running_" in name for name in moved)
