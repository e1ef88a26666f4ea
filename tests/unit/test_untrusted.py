"""Nothing that a user reads runs code: manifests, checkpoints, `.nemo` files, tokenizers.

Every payload would touch a marker file. It must be refused, with file and class or type named, and the marker not be
there.
"""

import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from lhotse import AudioSource, MonoCut, Recording
from megatron.core import dist_checkpointing

from nemo_mapo.checksums import checksums_of, files_to_sum, write_checksums
from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.data.dataset import load_waveform
from nemo_mapo.data.importers.audio import AudioStore
from nemo_mapo.data.manifests import validate_manifest
from nemo_mapo.data.tokenizer import load_tokenizer
from nemo_mapo.models import nemo_files
from nemo_mapo.models.untrusted import checkpoint_reader
from nemo_mapo.training.checkpoint import has_adapters, load_checkpoint, read_checkpoint, write_checkpoint
from support.nemo_archives import nemo_archive, saved
from support.tiny import tiny_audio_llm


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


class Payload:
    """Unpickled, it touches a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_the_payload_works(marker: Path) -> None:
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


def cut_from(kind: str, source: str) -> MonoCut:
    recording = Recording(
        id="r", sources=[AudioSource(type=kind, channels=[0], source=source)], sampling_rate=16000, num_samples=1600,
        duration=0.1,
    )  # fmt: skip
    return MonoCut(id="c", start=0, duration=0.1, channel=0, recording=recording)


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("command", "touch {}", "'command'"),
        ("url", "pipe:touch {}", "'url'"),
        ("file", "pipe:touch {}", "is a command"),
        ("file", "x.sph; touch {} .sph", "rename the file"),
        ("file", "x'; touch {} '.opus", "rename the file"),
    ],
)
def test_audio_that_would_run_a_command_is_refused_where_it_is_decoded(marker, kind, source, said) -> None:
    with pytest.raises(ValueError, match=said):
        load_waveform(cut_from(kind, source.format(marker)))
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["command", "url", "memory", "shar"])
def test_a_manifest_that_names_anything_but_files_is_refused_with_its_line(tmp_path, marker, kind) -> None:
    cut = cut_from("file", "x").to_dict()
    cut["recording"]["sources"][0] |= {"type": kind, "source": f"touch {marker}"}
    manifest = tmp_path / "cuts.jsonl"
    manifest.write_text(json.dumps(cut) + "\n")
    config = DatasetConfig(input_cfg=({"type": "lhotse", "cuts_path": str(manifest)},))
    with pytest.raises(ValueError, match=rf"cuts\.jsonl:1: cut c: audio source of type '{kind}'"):
        validate_manifest(config)
    assert not marker.exists()


def test_a_nemo_manifest_with_a_command_in_a_file_name_is_refused(tmp_path, marker) -> None:
    manifest = tmp_path / "train.json"
    question = {"question": "?", "choices": ["a", "b"], "answer": "a", "task": "t"}
    record = {"audio_filepath": f"x.sph; touch {marker} .sph", "duration": 1.0, **question}
    manifest.write_text(json.dumps(record) + "\n")
    config = DatasetConfig(input_cfg=({"type": "nemo", "manifest_filepath": str(manifest)},))
    with pytest.raises(ValueError, match="rename the file"):
        validate_manifest(config)
    assert not marker.exists()


def test_a_corpus_with_a_command_in_a_file_name_is_refused(tmp_path, marker) -> None:
    audio = tmp_path / f"x'; touch {marker.name} '.opus"
    audio.write_bytes(b"OggS")
    with pytest.raises(ValueError, match="rename the file"):
        AudioStore(tmp_path, sample_rate=16000, resample=True).add(audio, "line 1")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "step_000001"
    write_checkpoint(path, tiny_audio_llm().model, state={"step": 1})
    return path


def test_an_honest_checkpoint_is_read(checkpoint: Path) -> None:
    assert load_checkpoint(checkpoint, tiny_audio_llm(seed=1).model) == {"step": 1}


def refusals(checkpoint: Path) -> list[str]:
    """What is said by everything that opens a checkpoint, once its checksums fit what was put into it."""
    write_checksums(checkpoint, checksums_of(files_to_sum(checkpoint)))
    said = []
    for opens in (
        read_checkpoint,
        checkpoint_reader,
        has_adapters,
        lambda path: load_checkpoint(path, tiny_audio_llm().model),
    ):
        with pytest.raises(ValueError) as caught:
            opens(checkpoint)
        said.append(str(caught.value))
    return said


def test_code_in_the_common_part_of_a_checkpoint_is_refused(checkpoint, marker) -> None:
    torch.save({"rng": Payload(marker)}, checkpoint / "common.pt")
    assert all("common.pt" in said and "posix.system" in said for said in refusals(checkpoint))
    assert not marker.exists()


def test_code_in_the_description_of_a_checkpoint_is_refused(checkpoint, marker) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    assert all(".metadata names posix.system" in said for said in refusals(checkpoint))
    assert not marker.exists()


def test_code_in_an_object_among_the_tensors_of_a_checkpoint_is_refused(checkpoint, marker) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if "_extra_state" in index.fqn)
    content = io.BytesIO()
    torch.save(Payload(marker), content)
    (checkpoint / "__9_0.distcp").write_bytes(content.getvalue())
    place = metadata.storage_data[index]
    place.relative_path, place.offset, place.length = "__9_0.distcp", 0, len(content.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    assert all("__9_0.distcp" in said and "posix.system" in said for said in refusals(checkpoint))
    assert not marker.exists()


def test_a_checkpoint_that_reaches_outside_of_its_directory_is_refused(checkpoint) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere.distcp"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    assert all("elsewhere.distcp" in said for said in refusals(checkpoint))


def test_a_checkpoint_in_another_format_is_refused(checkpoint) -> None:
    named = json.loads((checkpoint / "metadata.json").read_text())
    (checkpoint / "metadata.json").write_text(json.dumps(named | {"sharded_backend": "zarr"}))
    assert all("sharded_backend must be torch_dist" in said for said in refusals(checkpoint))


def test_upstream_runs_the_code_that_is_refused_here(checkpoint, marker) -> None:
    """Why the files are looked at first: without it this test would have no marker."""
    torch.save({"rng": Payload(marker)}, checkpoint / "common.pt")
    try:
        dist_checkpointing.load_common_state_dict(str(checkpoint))
    except pickle.UnpicklingError:
        pytest.skip("this release of Megatron-core refuses it too")
    assert marker.exists()


def test_code_in_the_weights_of_a_nemo_file_is_refused(tmp_path, marker) -> None:
    archive = nemo_archive(tmp_path / "x.nemo", {"./model_weights.ckpt": saved(Payload(marker))})
    with pytest.raises(ValueError, match=r"x\.nemo: \./model_weights\.ckpt .*posix\.system"):
        nemo_files.refuse_code(archive)
    assert not marker.exists()


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "nemo.collections.asr.models.asr_model.os.system",
        "nemo.collections.asr.models.asr_model.torch.load",
        "nemo.utils.exp_manager.exp_manager",
        "nemo.collections.asr.nowhere.Encoder",
        "nemo.collections.asr.models.asr_model.ABC",
    ],
)
def test_a_nemo_config_that_builds_anything_but_a_class_of_nemo_is_refused(tmp_path, target) -> None:
    config = f"encoder:\n  layers:\n  - _target_: {target}\n    command: touch x\n"
    archive = nemo_archive(tmp_path / "x.nemo", {"model_config.yaml": config.encode()})
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\._target_ is"):
        nemo_files.refuse_code(archive)


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        ("${oc.create:{_target_:nemo.collections.asr.models.asr_model.os.system}}", "encoder is .* computed"),
        ("${oc.decode:${hidden}}", "encoder is .* computed"),
        ("${${hidden}:x}", "encoder is .* computed"),
        ({"trust_remote_code": True}, r"encoder\.trust_remote_code is True"),
        ({"trust_remote_code": "${yes}"}, r"encoder\.trust_remote_code is"),
    ],
)
def test_a_nemo_config_that_hides_what_it_builds_is_refused(encoder, said) -> None:
    with pytest.raises(ValueError, match=said):
        nemo_files.refuse_foreign_classes({"encoder": encoder, "hidden": "{_target_: os.system}"}, "x.nemo")


def test_a_nemo_config_may_refer_to_its_other_fields() -> None:
    nemo_files.refuse_foreign_classes({"encoder": {"feat_in": "${preprocessor.features}"}, "ratio": "1:2"}, "x.nemo")


def test_a_nemo_file_with_python_in_its_yaml_or_a_member_outside_is_refused(tmp_path, marker) -> None:
    python = f"a: !!python/object/apply:os.system ['touch {marker}']\n".encode()
    with pytest.raises(ValueError, match="not YAML"):
        nemo_files.refuse_code(nemo_archive(tmp_path / "a.nemo", {"model_config.yaml": python}))
    with pytest.raises(ValueError, match="outside the archive"):
        nemo_files.refuse_code(nemo_archive(tmp_path / "b.nemo", {"../model_config.yaml": b""}))
    assert not marker.exists()


def test_code_beside_a_tokenizer_is_not_run(tmp_path, marker) -> None:
    (tmp_path / "evil.py").write_text(f"import os\nos.system('touch {marker}')\nclass T: pass\n")
    settings = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="no usable Hugging Face tokenizer"):
        load_tokenizer(tmp_path)
    assert not marker.exists()
