"""NeMo's older ModularAudioGPT in and out, against NeMo's own class; nemo_modular_audio_gpt.py says how that runs."""

import io
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import nemo
import pytest
import torch
import yaml
from integration.parts_tiny import load_policy, save_chat_model
from packaging.version import Version
from torch import Tensor
from transformers import AutoModelForCausalLM

from forked_commands import checked as run
from forked_commands import environment
from forked_commands import run as tried
from nemo_mapo.data.prompts import encode_prompt
from nemo_mapo.data.tokenizer import SALM_AUDIO, load_tokenizer
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.hf.files import ModelFiles
from nemo_mapo.models.hf.weights import WeightMap
from nemo_mapo.models.modular_audio_gpt import ArchiveFiles, read_modular_audio_gpt
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.training.modular_audio_gpt import export_modular_audio_gpt, import_modular_audio_gpt
from nemo_mapo.types import AudioBatch, Example, Wording
from support.nemo_archives import nemo_archive, saved
from tests.integration.tiny_run import metrics, write_tiny_corpus

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(Version(nemo.__version__).release >= (2, 5), reason="NeMo has no speech_llm since 2.5"),
]

Kind = Literal["whole", "frozen"]
QUESTIONS = ("is it low or high ?", "what is to be heard ?")
CLIPS = [torch.randn(n, generator=torch.Generator().manual_seed(n)) * 0.1 for n in (16000, 23456)]
NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Of the local layer spec, and the names that Transformer Engine gives them."""


@dataclass(frozen=True)
class Made:
    llm: Path
    archive: Path
    policy: Path


def nemos(*arguments: object) -> None:
    """Run nemo_modular_audio_gpt.py."""
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "nemo_modular_audio_gpt.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Made]:
    install_cpu_host()
    initialize_parallel()
    folder = tmp_path_factory.mktemp("modular")
    save_chat_model(folder / "llm", tie_word_embeddings=False)

    @cache
    def made(kind: Kind) -> Made:
        archive = folder / f"{kind}.nemo"
        nemos("make", folder / "llm", archive, kind)
        import_modular_audio_gpt(archive, folder / "llm", folder / f"{kind}-policy")
        return Made(folder / "llm", archive, folder / f"{kind}-policy")

    return made


def members_of(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as members:
        return {member.name: members.extractfile(member).read() for member in members if member.isfile()}


def state_of(archive: Path) -> dict[str, Any]:
    return torch.load(io.BytesIO(members_of(archive)["./model_weights.ckpt"]), weights_only=True)


def rewritten(made: Made, output: Path, /, *, state: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """A copy of the archive with another state, or with changes to its config; `a__b` is the field a.b."""
    contents = members_of(made.archive)
    if state is not None:
        contents["./model_weights.ckpt"] = saved(dict(state))
    config = yaml.safe_load(contents["./model_config.yaml"])
    for path, value in changes.items():
        *parents, name = path.split("__")
        inner = config
        for parent in parents:
            inner = inner[parent]
        inner[name] = value
    contents["./model_config.yaml"] = yaml.safe_dump(config).encode()
    return nemo_archive(output, contents)


def example(text: str) -> Example:
    return Example(id="1", question=text, choices=(), answer="low", task="t")


def our_logits(policy: Path, model: AudioLLM) -> list[tuple[Tensor, Tensor]]:
    """Tokens of the text behind each clip, and the logits there."""
    tokenizer = load_tokenizer(policy / "tokenizer")
    placeholder = tokenizer.convert_tokens_to_ids(SALM_AUDIO)
    found = []
    for text, clip in zip(QUESTIONS, CLIPS, strict=True):
        frames = model.num_audio_tokens(len(clip))
        ids = torch.tensor(encode_prompt(example(text), frames, tokenizer, Wording()))
        assert frames > 3 and (ids[:frames] == placeholder).all() and (ids[frames:] != placeholder).all()
        audio = AudioBatch(waveforms=clip[None], lengths=torch.tensor([len(clip)]))
        with torch.no_grad():
            logits = model(ids[None], audio, torch.tensor([0])).logits
        found.append((ids[frames:], logits[0, frames:]))
    return found


def nemos_logits(archive: Path, llm: Mapping[str, Tensor], folder: Path) -> list[tuple[Tensor, Tensor]]:
    torch.save({"rows": list(zip(QUESTIONS, CLIPS, strict=True)), "llm": dict(llm)}, folder / "in.pt")
    nemos("logits", archive, folder / "in.pt", folder / "out.pt")
    return torch.load(folder / "out.pt")


def decoder_of(made: Made) -> dict[str, Tensor]:
    """The LLM's directory under the names of Megatron's decoder, for NeMo's class."""
    files, decoder = ModelFiles(made.llm), read_modular_audio_gpt(made.archive, made.llm).model.config.decoder
    weights = WeightMap(decoder)
    names = [name for name in load_policy(made.policy, made.policy / "checkpoint").state_dict() if "extra" not in name]
    return {
        name.replace("language_model.", "model."): source.layout.fuse([files.read(theirs) for theirs in source.theirs])
        for name in names
        if name.startswith("language_model.")
        for source in [weights.source(name)]
    }


def assert_same(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> None:
    for (our_tokens, our_scores), (their_tokens, their_scores) in zip(ours, theirs, strict=True):
        assert our_tokens.tolist() == their_tokens.tolist()
        rows = min(our_scores.shape[-1], their_scores.shape[-1])
        assert float(their_scores.std()) > 0.5
        torch.testing.assert_close(our_scores[:, :rows], their_scores[:, :rows], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["whole", "frozen"])
def test_an_imported_archive_computes_what_nemos_class_does(make, kind: Kind, tmp_path: Path) -> None:
    """Prompts are tokenised alike, and logits agree with adapters merged, on the archive's LLM or the directory's."""
    made = make(kind)
    model = load_policy(made.policy, made.policy / "checkpoint")
    llm = decoder_of(made) if kind == "frozen" else {}
    assert_same(our_logits(made.policy, model), nemos_logits(made.archive, llm, tmp_path))


def test_names_of_transformer_engine_give_the_same_policy(make, tmp_path: Path) -> None:
    made = make("whole")
    state: dict[str, Any] = {}
    for name, value in state_of(made.archive).items():
        ours, theirs = next(((a, b) for a, b in NORMS.items() if name.endswith(a)), ("", ""))
        state[name.removesuffix(ours) + theirs] = io.BytesIO(b"fp8") if name.endswith("_extra_state") else value
    archive = rewritten(made, tmp_path / "te.nemo", state=state, name="te_gpt", transformer_engine=True)
    import_modular_audio_gpt(archive, made.llm, tmp_path / "policy")
    first = load_policy(made.policy, made.policy / "checkpoint").state_dict()
    again = load_policy(tmp_path / "policy", tmp_path / "policy" / "checkpoint").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items() if value is not None)


def test_an_archive_goes_back_bit_for_bit(make, tmp_path: Path) -> None:
    """Without adapters every tensor returns; with them NeMo's class computes the same, with `linear_out` zero."""
    made = make("whole")
    plain = {name: value for name, value in state_of(made.archive).items() if ".adapter_layer." not in name}
    archive = rewritten(made, tmp_path / "plain.nemo", state=plain, peft={"peft_scheme": None})
    import_modular_audio_gpt(archive, made.llm, tmp_path / "policy")
    export_modular_audio_gpt(tmp_path / "policy" / "checkpoint", archive, made.llm, tmp_path / "again.nemo")
    again, before = members_of(tmp_path / "again.nemo"), members_of(archive)
    assert again.keys() == before.keys() and again["./model_config.yaml"] == before["./model_config.yaml"]
    state = state_of(tmp_path / "again.nemo")
    assert list(state) == list(plain)
    assert all(value is None or torch.equal(value, state[name]) for name, value in plain.items())


def test_an_archive_is_trained_and_nemos_class_computes_what_the_trained_policy_does(make, tmp_path: Path) -> None:
    made, run_dir = make("whole"), tmp_path / "run"
    corpus = write_tiny_corpus(tmp_path / "synthetic")
    run("import_hf.py", "--model", made.archive, "--llm", made.llm, "--output", tmp_path / "policy")
    run(
        "train_mapo.py",
        *("--config-dir", str(tmp_path / "policy" / "conf"), "model=imported", "~warm_start"),
        f"data.tokenizer={tmp_path}/policy/tokenizer",
        f"pretrained_checkpoint.restore_from_path={tmp_path}/policy/checkpoint",
        f"data.corpus_dir={corpus}",
        f"exp_manager.explicit_log_dir={run_dir}",
        *("trainer.num_threads=1", "trainer.mapo.max_steps=3", "trainer.mapo.val_check_interval=3"),
        *("trainer.mapo.save_interval=3", "trainer.mapo.num_rollouts_per_prompt=2", "data.train_ds.batch_size=4"),
        *("model.global_batch_size=4", "model.micro_batch_size=4", "rollout.sampling.max_new_tokens=8"),
        *("model.optim.lr=1e-2", "model.lora={rank: 2, alpha: 6}", "data.test_ds=null"),
    )
    assert all(record["rollout/log_prob_gap"] < 1e-3 for record in metrics(run_dir)[1:])
    checkpoint, trained = run_dir / "checkpoints" / "step_000003", tmp_path / "trained.nemo"
    run("export_hf.py", "--checkpoint", checkpoint, "--original", made.archive, "--llm", made.llm, "--output", trained)
    import_modular_audio_gpt(trained, made.llm, tmp_path / "again")
    ours = our_logits(tmp_path / "again", load_policy(tmp_path / "again", tmp_path / "again" / "checkpoint"))
    before = our_logits(made.policy, load_policy(made.policy, made.policy / "checkpoint"))
    assert any(not torch.allclose(a, b, atol=1e-2) for (_, a), (_, b) in zip(ours, before, strict=True))
    assert_same(ours, nemos_logits(trained, {}, tmp_path))


def test_the_decoder_of_an_archive_with_a_frozen_llm_goes_out_for_transformers(make, tmp_path: Path) -> None:
    made = make("frozen")
    with pytest.raises(ValueError, match=r"not the LLM that they belong to.*--thinker-only"):
        export_modular_audio_gpt(made.policy / "checkpoint", made.archive, made.llm, tmp_path / "out.nemo")
    assert not list(tmp_path.iterdir())
    original = made.policy / "original"
    run(
        "export_hf.py",
        *("--checkpoint", made.policy / "checkpoint", "--original", original, "--thinker-only"),
        *("--output", tmp_path / "decoder"),
    )
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder").eval()
    policy = load_policy(made.policy, made.policy / "checkpoint")
    ids = load_tokenizer(made.policy / "tokenizer")(QUESTIONS[0], return_tensors="pt").input_ids
    silence = AudioBatch(waveforms=torch.zeros(0, 0), lengths=torch.zeros(0, dtype=torch.long))
    with torch.no_grad():
        ours = policy(ids, silence, torch.tensor([-1])).logits
        torch.testing.assert_close(ours, decoder(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target": "nemo.collections.nlp.models.MegatronGPTModel"}, r"target='nemo\.collections\.nlp"),
        ({"mcore_gpt": False}, "mcore_gpt=False, only True"),
        ({"activation": "gelu"}, "activation='gelu', only 'fast-swiglu' or 'swiglu'"),
        ({"normalization": "layernorm1p"}, "normalization='layernorm1p', only 'rmsnorm'"),
        ({"rotary_percentage": 0.5}, r"rotary_percentage=0\.5, only 1\.0"),
        ({"num_moe_experts": 8}, "num_moe_experts=8, only None"),
        ({"num_layers": 3}, "num_layers=3, but .*llm says 2"),
        ({"rotary_base": 500000}, "rotary_base=500000, but .*llm says 10000"),
        ({"qkv_bias": True}, "qkv_bias=True, but .*llm says False"),
        ({"peft__peft_scheme": "ia3"}, r"peft\.peft_scheme='ia3', only"),
        ({"peft__lora_tuning__variant": "canonical"}, r"peft\.lora_tuning\.variant='canonical'"),
        ({"perception__encoders": {"a": {}}}, r"perception\.encoders=\{'a': \{\}\}, only None"),
        ({"perception__use_multi_layer_feat": True}, r"perception\.use_multi_layer_feat=True"),
        ({"perception__encoder": {"_target_": "os.system"}}, "encoder._target_ is 'os.system', not a class of NeMo"),
        ({"data__end_string": "${oc.env:HOME}"}, "data.end_string is .*computed when it is read"),
        ({"data__train_ds__add_sep": True}, r"data\.train_ds\.add_sep=True, only False"),
        ({"data__train_ds__prompt_template": "{output} {input} !"}, r"data\.train_ds\.prompt_template='\{output\}"),
    ],
)
def test_what_the_policy_would_not_compute_is_refused_by_field_and_value(make, changes, named, tmp_path: Path) -> None:
    made = make("whole")
    archive = rewritten(made, tmp_path / "changed.nemo", **changes)
    with pytest.raises(ValueError, match=named):
        import_modular_audio_gpt(archive, made.llm, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


def test_tensors_that_do_not_belong_are_refused_by_name(make, tmp_path: Path) -> None:
    made = make("whole")
    state = state_of(made.archive)
    adapter = "model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight"
    cases = {
        "missing from the files: model.decoder.layers.1.mlp.linear_fc2.weight": {
            name: value for name, value in state.items() if name != "model.decoder.layers.1.mlp.linear_fc2.weight"
        },
        "neither mapped nor left aside: model.decoder.extra.weight": state
        | {"model.decoder.extra.weight": torch.ones(2)},
        "describes a model whose": state | {"model.decoder.final_layernorm.weight": torch.ones(31)},
        "one of its two parts is missing": {name: value for name, value in state.items() if name != adapter},
        "is an adapter other than": state
        | {adapter.replace("lora_kqv", "ptuning"): torch.ones(2), adapter.replace("kqv", "unfused_kqv"): torch.ones(2)},
    }
    for named, wrong in cases.items():
        archive = rewritten(made, tmp_path / "wrong.nemo", state=wrong)
        with pytest.raises(ValueError, match=named):
            import_modular_audio_gpt(archive, made.llm, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


def test_weights_of_several_ranks_are_refused(make, tmp_path: Path) -> None:
    made = make("whole")
    contents = {
        name.replace("model_weights", "mp_rank_00/model_weights"): content
        for name, content in members_of(made.archive).items()
    }
    nemo_archive(tmp_path / "ranks.nemo", contents)
    with pytest.raises(
        ValueError, match=r"no model_weights\.ckpt \(it holds mp_rank_00/model_weights\.ckpt\).*one rank"
    ):
        import_modular_audio_gpt(tmp_path / "ranks.nemo", made.llm, tmp_path / "policy")


def test_the_command_asks_for_the_llm_and_takes_no_other_file(make, tmp_path: Path) -> None:
    made = make("whole")
    refused = tried("import_hf.py", "--model", made.archive, "--output", tmp_path / "policy")
    assert refused.returncode == 1 and "needs --llm, the Hugging Face directory of its LLM" in refused.stderr
    (tmp_path / "asr.nemo").write_bytes(b"no archive")
    refused = tried(
        "import_hf.py", "--model", tmp_path / "asr.nemo", "--llm", made.llm, "--output", tmp_path / "policy"
    )
    assert refused.returncode == 1 and "asr.nemo is not a .nemo file" in refused.stderr


def test_weights_that_would_run_code_are_refused(make, tmp_path: Path) -> None:
    made, marker = make("whole"), tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (Path.touch, (marker,))

    archive = rewritten(made, tmp_path / "payload.nemo", state={"model.x": Payload()})
    with pytest.raises(ValueError, match=r"model_weights\.ckpt holds more than tensors"):
        import_modular_audio_gpt(archive, made.llm, tmp_path / "policy")
    assert not marker.exists() and not (tmp_path / "policy").exists()


def test_adapters_are_scaled_by_alpha_over_rank(make, tmp_path: Path) -> None:
    made = make("whole")
    state = state_of(made.archive)
    files = ArchiveFiles(made.archive, tmp_path / "weights.ckpt", lora_scale=3.0)
    stem = "model.decoder.layers.1.mlp.adapter_layer.lora_4htoh_adapter"
    weight = "model.decoder.layers.1.mlp.linear_fc2.weight"
    product = state[f"{stem}.linear_out.weight"] @ state[f"{stem}.linear_in.weight"]
    torch.testing.assert_close(files.read(weight), state[weight] + 3.0 * product)
    assert read_modular_audio_gpt(made.archive, made.llm).lora_scale == 3.0
