"""An audio LLM from parts: the parts compute what they did, the policy trains, and the decoder goes out again."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from integration.parts_tiny import RATE, load_policy, save_chat_model, save_whisper
from integration.qwen_omni_tiny import save_tiny, tower
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from forked_commands import ROOT
from forked_commands import checked as run
from nemo_mapo.config.compose import compose
from nemo_mapo.config.load import load
from nemo_mapo.config.model import ProjectorConfig, WhisperPerceptionConfig
from nemo_mapo.config.run import RunConfig, SamplingConfig
from nemo_mapo.data.tokenizer import SpecialTokens, load_tokenizer
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.encoders import load_weights, read_any_encoder
from nemo_mapo.models.hf.convert import export_hf
from nemo_mapo.models.perception import build_perception
from nemo_mapo.models.projector import Projector
from nemo_mapo.models.whisper import WhisperPerception
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rollout.trtllm.backend import TrtllmRollout
from nemo_mapo.rows import Prompt
from nemo_mapo.training.assemble import assemble
from nemo_mapo.types import AudioBatch
from support.trtllm_runtime import MegatronRuntime
from tests.integration.tiny_run import metrics, write_tiny_corpus

pytestmark = pytest.mark.integration

TOKENS = ("<|audio_start|>", "<|audio|>", "<|audio_end|>", "<|pad|>")
NO_AUDIO = AudioBatch(waveforms=torch.zeros(0, 0), lengths=torch.zeros(0, dtype=torch.long))


@dataclass(frozen=True)
class Made:
    whisper: Path
    encoder: WhisperEncoder
    decoder: Path
    llama: LlamaForCausalLM
    policy: Path
    model: AudioLLM


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    install_cpu_host()
    initialize_parallel()
    folder = tmp_path_factory.mktemp("parts")
    encoder = save_whisper(folder / "whisper").model.encoder
    llama = save_chat_model(folder / "llama")
    assemble(
        read_any_encoder(folder / "whisper", projector="mlp", stack=None), folder / "llama", folder / "policy", seed=0
    )
    return Made(
        folder / "whisper",
        encoder,
        folder / "llama",
        llama,
        folder / "policy",
        load_policy(folder / "policy", folder / "policy" / "checkpoint"),
    )


@torch.no_grad()
def test_the_decoder_answers_as_before(made: Made) -> None:
    tokens = torch.arange(9, 29)[None]
    found = made.model(tokens, NO_AUDIO, torch.tensor([-1])).logits
    wanted = made.llama(tokens).logits
    old = len(load_tokenizer(made.decoder))
    assert wanted.std() > 0.5
    assert float((found[..., :old] - wanted[..., :old]).abs().max()) <= 1e-4


def test_new_tokens_have_the_mean_of_the_old_ones(made: Made) -> None:
    before, after = load_tokenizer(made.decoder), load_tokenizer(made.policy / "tokenizer")
    new = after.convert_tokens_to_ids(list(TOKENS))
    assert new == list(range(len(before), len(before) + 4)) and len(after) == len(before) + 4
    rows = made.model.state_dict()["language_model.embedding.word_embeddings.weight"]
    old = made.llama.state_dict()["model.embed_tokens.weight"]
    assert rows.shape[0] == len(after)
    assert torch.equal(rows[: len(before)], old[: len(before)])
    torch.testing.assert_close(rows[new], old[: len(before)].mean(0).expand(4, -1), rtol=0, atol=1e-7)


@torch.no_grad()
def test_a_clip_has_the_positions_of_whisper_that_are_not_padding(made: Made) -> None:
    perception = made.model.perception
    assert isinstance(perception, WhisperPerception)
    clips = [torch.randn(samples, generator=torch.Generator().manual_seed(samples)) for samples in (320, 24123, 480000)]
    waveforms = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    frames, counts = perception(waveforms, torch.tensor([len(clip) for clip in clips]))
    extractor = WhisperFeatureExtractor.from_pretrained(made.whisper)
    # 20 ms a position and 80 ms a token: 1, 76 and 1,500 positions.
    assert counts.tolist() == [1, 19, 375] == [perception.num_tokens(len(clip)) for clip in clips]
    for clip, row, positions, tokens in zip(clips, frames, (1, 76, 1500), counts.tolist(), strict=True):
        features = extractor(clip.numpy(), sampling_rate=RATE, return_tensors="pt").input_features
        heard = made.encoder(features).last_hidden_state[0, :positions]
        assert float((perception.projector([heard])[0] - row[:tokens]).abs().max()) <= 1e-5
    alone, _ = perception(clips[1][None], torch.tensor([len(clips[1])]))
    assert float((alone[0] - frames[1, :19]).abs().max()) <= 1e-5
    with pytest.raises(ValueError, match=r"longer than the 30 s that Whisper's encoder takes; set max_duration=30"):
        perception.num_tokens(480001)


@torch.no_grad()
def test_a_frozen_whisper_encodes_a_clip_once_and_alike(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    perception = made.model.perception
    assert isinstance(perception, WhisperPerception)
    clips = [torch.randn(samples, generator=torch.Generator().manual_seed(samples)) for samples in (320, 24123)]
    waveforms, lengths = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True), torch.tensor([320, 24123])
    learning, _ = perception(waveforms, lengths)
    perception.module.requires_grad_(False)
    try:
        first, _ = perception(waveforms, lengths)
        monkeypatch.setattr(perception.module, "forward", None)  # not asked again
        again, _ = perception(waveforms, lengths)
        alone, _ = perception(clips[1][None], lengths[1:])
    finally:
        perception.module.requires_grad_(True)
    assert float((first - learning).abs().max()) <= 1e-5
    assert torch.equal(again, first)
    assert float((alone[0] - first[1]).abs().max()) <= 1e-6


def test_the_projector_stacks_neighbours_and_fills_the_last_up() -> None:
    projector = Projector(ProjectorConfig(type="linear", stack=2), 1, 2)
    with torch.no_grad():
        projector.layers[0].weight.copy_(torch.eye(2))
        projector.layers[0].bias.zero_()
    found = projector([torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0], [5.0]])])
    assert [clip.tolist() for clip in found] == [[[1, 2], [3, 0]], [[4, 5]]]
    assert [projector.num_tokens(frames) for frames in (1, 2, 3)] == [1, 1, 2]


@torch.no_grad()
def test_the_encoder_of_a_qwen_omni_model_is_taken_with_its_weights(tmp_path: Path) -> None:
    hf = save_tiny(tmp_path / "qwen", "qwen3_omni_moe")
    encoder = read_any_encoder(hf.directory, projector="linear", stack=2)
    perception = build_perception(encoder.perception, 48, RATE)
    load_weights(perception, encoder)
    theirs = tower(hf.thinker, "audio_tower").state_dict()
    own = perception.module.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)
    clip = torch.randn(1, 24123)
    frames, counts = perception(clip, torch.tensor([24123]))
    assert frames.shape == (1, perception.num_tokens(24123), 48) and counts.tolist() == [perception.num_tokens(24123)]


def test_parts_that_do_not_fit_are_refused(made: Made, tmp_path: Path) -> None:
    whisper = read_any_encoder(made.whisper, projector="mlp", stack=None)
    with pytest.raises(ValueError, match="model_type='whisper'; this command knows llama"):
        assemble(whisper, made.whisper, tmp_path / "x", seed=0)
    with pytest.raises(ValueError, match=r"projector='adapter' is for .nemo encoders only"):
        read_any_encoder(made.whisper, projector="adapter", stack=None)
    with pytest.raises(
        ValueError, match=r"model_type='llama'; encoders are supported from whisper, .* and .nemo files"
    ):
        read_any_encoder(made.decoder, projector="mlp", stack=None)
    with pytest.raises(ValueError, match="give projector=linear, or adapter"):
        read_any_encoder(tmp_path / "asr.nemo", projector="mlp", stack=None)
    values = WhisperPerceptionConfig(encoder={"dropout": 0.1}, features={"feature_size": 80})
    with pytest.raises(ValueError, match=r"encoder.dropout=0.1: set it to 0"):
        build_perception(values, 32, RATE)
    assert not (tmp_path / "x").exists()


def test_the_policy_passes_the_start_up_checks_of_tensorrt_llm_and_draws_the_same_there(made: Made) -> None:
    asked = ("model=imported", "rollout=trtllm", "trainer.accelerator=gpu", "~warm_start")
    tokenizer = load_tokenizer(made.policy / "tokenizer")
    config = load(
        compose(ROOT / "conf" / "train_mapo.yaml", asked, search_path=[made.policy / "conf"]),
        RunConfig,
    )
    assert config.rollout.trtllm is not None
    engine = MegatronRuntime(
        config.model, vocab_size=made.model.vocab_size, max_batch_size=2, max_prompt_embedding_table_size=64
    )
    special = SpecialTokens.from_tokenizer(tokenizer)
    heard = torch.randn(9600, generator=torch.Generator().manual_seed(0))
    placeholders = [special.audio_id] * made.model.num_audio_tokens(len(heard))
    ids = torch.tensor([special.audio_start_id, *placeholders, special.audio_end_id, *range(9, 19)])
    prompts = [Prompt(id="heard", token_ids=ids, clips=(heard,)), Prompt(id="read", token_ids=torch.arange(9, 29))]
    backends = (
        TrtllmRollout(engine, made.model, tokenizer, config.rollout.trtllm, batch_size=2),
        MegatronRollout(made.model, tokenizer, batch_size=2),
    )
    backends[0].update_weights(1, ())
    found = [
        [
            one.token_ids.tolist()
            for (one,) in backend.generate(
                prompts,
                SamplingConfig(temperature=0.0, max_new_tokens=8),
                group_size=1,
                seeds=torch.zeros(2, dtype=torch.int64),
            )
        ]
        for backend in backends
    ]
    assert found[0] == found[1]


def test_the_policy_trains_and_its_decoder_goes_out(made: Made, tmp_path: Path) -> None:
    policy, run_dir = tmp_path / "policy", tmp_path / "run"
    told = run("assemble.py", "--encoder", made.whisper, "--decoder", made.decoder, "--output", policy)
    assert f"restore_from_path={policy}/checkpoint" in told and " ".join(TOKENS) in told
    corpus = write_tiny_corpus(tmp_path / "synthetic")
    run(
        "train_mapo.py",
        *("--config-dir", policy / "conf", "model=imported", "~warm_start"),
        f"data.tokenizer={policy}/tokenizer",
        f"pretrained_checkpoint.restore_from_path={policy}/checkpoint",
        f"data.corpus_dir={corpus}",
        f"exp_manager.explicit_log_dir={run_dir}",
        *("trainer.num_threads=1", "trainer.mapo.max_steps=3", "trainer.mapo.val_check_interval=3"),
        *("trainer.mapo.save_interval=3", "trainer.mapo.num_rollouts_per_prompt=2", "data.train_ds.batch_size=4"),
        *("model.global_batch_size=4", "model.micro_batch_size=4", "rollout.sampling.max_new_tokens=8"),
        *("model.optim.lr=1e-3", "data.test_ds=null"),
    )
    steps = metrics(run_dir)[1:]
    assert len(steps) == 3 and all(record["rollout/log_prob_gap"] < 1e-3 for record in steps)
    assert all(record["mapo/audio_mass"] > 0 for record in steps)
    checkpoint, exported = run_dir / "checkpoints" / "step_000003", tmp_path / "exported"
    arguments = ("--checkpoint", checkpoint, "--output", exported)
    run("export_hf.py", *arguments, "--original", policy / "original", "--thinker-only")
    after = AutoModelForCausalLM.from_pretrained(exported)
    assert after.config.vocab_size == len(load_tokenizer(exported)) == made.llama.config.vocab_size + 3
    assert not torch.equal(after.model.norm.weight, made.llama.model.norm.weight)
    heard = load_file(exported / "perception" / "model.safetensors")
    start = made.model.state_dict()
    for name in ("perception.projector.layers.0.weight", "perception.module.conv1.weight"):
        assert heard[name].shape == start[name].shape and not torch.equal(heard[name], start[name])
    assert json.loads((exported / "perception.json").read_text())["type"] == "whisper"
    with pytest.raises(ValueError, match="whose vocabulary has grown; give the folder `original`"):
        export_hf(checkpoint, made.decoder, tmp_path / "no")
