"""What users bring from outside of the repository: a corpus that was tarred for NeMo, and a reward in a package."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from nemo_mapo.data.manifests import load_cuts
from nemo_mapo.data.splits import manifest_path
from nemo_mapo.launch import run
from tests.integration.tiny_run import metrics, write_tiny_corpus
from tests.integration.trainers import config_of, fit, trainer_of

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "synthetic")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package outside of the repository with a reward in it, as CONTRIBUTING says."""
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "__init__.py").write_text("")
    (tmp_path / "my_pkg" / "rewards.py").write_text(
        "import zlib\n"
        "def checksum(samples, *, modulus):\n"
        "    texts = (f'{sample.example.id} {sample.text} {sample.num_tokens}' for sample in samples)\n"
        "    return [zlib.crc32(text.encode()) % modulus / modulus for text in texts]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("my_pkg", "my_pkg.rewards"):
        sys.modules.pop(name, None)


def tarred(corpus, directory):
    """Two shards of the training split, as NeMo's convert_to_tarred_audio_dataset.py writes them."""
    cuts = list(load_cuts(manifest_path(corpus, "train")))
    for shard in range(2):
        lines = []
        with tarfile.open(directory / f"audio_{shard}.tar", "w") as tar:
            for cut in cuts[shard::2]:
                content = Path(cut.recording.sources[0].source).read_bytes()
                member = tarfile.TarInfo(f"{cut.id}.flac")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                line = {"audio_filepath": member.name, "duration": cut.duration, "shard_id": shard, "id": cut.id}
                lines.append(json.dumps(line | cut.custom))
        (directory / f"manifest_{shard}.json").write_text("\n".join(lines))
    return {
        "type": "nemo_tarred",
        "manifest_filepath": f"{directory}/manifest__OP_0..1_CL_.json",
        "tarred_audio_filepaths": f"{directory}/audio__OP_0..1_CL_.tar",
    }


OWN = "rewards.terms.own={type: custom, path: my_pkg.rewards:checksum, weight: 0.5, arguments: {modulus: 10}}"


def test_a_tarred_corpus_trains_with_a_users_reward_and_goes_on_where_it_was_stopped(corpus, tmp_path, package):
    items = [{"type": "group", "input_cfg": [tarred(corpus, tmp_path)]}]
    (tmp_path / "items.yaml").write_text(yaml.safe_dump(items))
    overrides = [f"data.train_ds.input_cfg={tmp_path}/items.yaml", OWN, "objective.advantages=per_reward"]

    def trainer(name, *more):
        return trainer_of(corpus, tmp_path / name, *overrides, *more)

    whole = trainer("whole")
    assert fit(whole)
    records = metrics(tmp_path / "whole")
    for record in records[1:]:
        parts = {name: record[f"rollout/{name}"] for name in ("accuracy", "format", "consistency", "own")}
        assert record["rollout/reward_mean"] == pytest.approx(
            2 * parts["accuracy"] + parts["format"] + parts["consistency"] + 0.5 * parts["own"]
        )
        assert 0.0 < parts["own"] < 1.0 and record["rollout/equal_reward_groups"] < 1.0

    stopped = trainer("stopped", "trainer.mapo.max_steps=2")
    assert fit(stopped)
    resumed = trainer("stopped")
    resumed.resume(stopped.checkpoints.latest())
    assert fit(resumed)
    ends = [metrics(tmp_path / name)[-1] for name in ("whole", "stopped")]
    assert all(ends[0][name] == ends[1][name] for name in ("train/loss", "rollout/own", "rollout/reward_mean"))


def test_a_reward_that_cannot_be_imported_ends_the_run_before_anything_is_made(corpus, tmp_path, monkeypatch):
    config = config_of(corpus, tmp_path / "run", OWN)
    with pytest.raises(ValueError, match=r"rewards\.terms\.own\.path=my_pkg\.rewards:checksum: no module my_pkg"):
        run(config)
    (tmp_path / "my_pkg").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot import my_pkg\.rewards \(ModuleNotFoundError"):
        run(config)
    sys.modules.pop("my_pkg", None)
    assert not (tmp_path / "run").exists()


def test_a_reward_that_raises_ends_the_run_and_is_named(corpus, tmp_path, package):
    (tmp_path / "my_pkg" / "rewards.py").write_text("def checksum(samples, *, modulus): return samples[0].no_such\n")
    trainer = trainer_of(corpus, tmp_path / "run", OWN)
    with pytest.raises(ValueError, match=r"rewards\.terms\.own \(my_pkg\.rewards:checksum\) raised AttributeError"):
        fit(trainer)
