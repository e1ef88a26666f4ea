"""What users bring from outside of the repository: a tarred corpus of NeMo's, and the recipes of CONTRIBUTING.md."""

import importlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from integration.hf_decoder_tiny import SHAPE, save_tiny_decoder
from integration.qwen_omni_tiny import hf_logits, imported_model, our_logits, row
from transformers import MistralConfig

from nemo_mapo.data.manifests import load_cuts
from nemo_mapo.data.splits import manifest_path
from nemo_mapo.launch import run
from nemo_mapo.models.hf.convert import import_hf
from nemo_mapo.models.hf.models import DECODERS, read_model
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.training.sources import RolloutSource
from tests.integration.tiny_run import ROOT, command, environment, metrics, write_tiny_corpus
from tests.integration.trainers import config_of, fit, trainer_of

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "synthetic")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a module of a package outside of the repository, which can then be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(module, source):
        (tmp_path / "my_pkg").mkdir(exist_ok=True)
        (tmp_path / "my_pkg" / "__init__.py").touch()
        (tmp_path / "my_pkg" / f"{module}.py").write_text(source)

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_pkg"]:
        del sys.modules[name]


@pytest.fixture
def reward(package):
    """A reward, as CONTRIBUTING says."""
    package(
        "rewards",
        "import zlib\n"
        "def checksum(samples, *, modulus):\n"
        "    texts = (f'{sample.example.id} {sample.text} {sample.num_tokens}' for sample in samples)\n"
        "    return [zlib.crc32(text.encode()) % modulus / modulus for text in texts]\n",
    )


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


def test_a_tarred_corpus_trains_with_a_users_reward_and_goes_on_where_it_was_stopped(corpus, tmp_path, reward):
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
    package("rewards", "def checksum(samples, *, modulus): return samples[0].no_such\n")
    trainer = trainer_of(corpus, tmp_path / "run", OWN)
    with pytest.raises(ValueError, match=r"rewards\.terms\.own \(my_pkg\.rewards:checksum\) raised AttributeError"):
        fit(trainer)


def test_a_custom_source_wraps_that_of_the_trainer(corpus, tmp_path, package):
    package(
        "sources",
        "from dataclasses import replace\n"
        "class Shortest:\n"
        "    '''Gives the group with the shortest completions in place of all others.'''\n"
        "    def __init__(self, inner):\n"
        "        self.inner = inner\n"
        "        self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict\n"
        "        self.close = inner.close\n"
        "    def next(self, step, *, version):\n"
        "        drawn = self.inner.next(step, version=version)\n"
        "        shortest = min(drawn.groups, key=lambda group: sum(map(len, group.completions)))\n"
        "        metrics = drawn.metrics | {'rollout/shortest': float(sum(map(len, shortest.completions)))}\n"
        "        return replace(drawn, groups=[shortest] * len(drawn.groups), metrics=metrics)\n",
    )
    trainer = trainer_of(corpus, tmp_path / "run")
    trainer.source = importlib.import_module("my_pkg.sources").Shortest(trainer.source)
    assert isinstance(trainer.source, RolloutSource) and fit(trainer)
    for record in metrics(tmp_path / "run"):
        assert record["rollout/completion_tokens"] == pytest.approx(record["rollout/shortest"] / 2)


def test_a_custom_decoder_family_computes_what_transformers_does(tmp_path, package):
    package(
        "families",
        "from nemo_mapo.models.hf.models import DECODERS, DecoderFamily\n"
        "DECODERS['mistral'] = DecoderFamily('MistralConfig')\n",
    )
    install_cpu_host()
    initialize_parallel()
    config = MistralConfig(**SHAPE, sliding_window=None)
    hf = save_tiny_decoder(tmp_path / "original", config)
    with pytest.raises(ValueError, match="model_type='mistral'"):
        read_model(hf.directory)
    importlib.import_module("my_pkg.families")
    try:
        import_hf(hf.directory, tmp_path / "imported")
        rows = [row("qwen2_5_omni", length, seed=length) for length in (5, 40)]
        found, wanted = our_logits(imported_model(tmp_path / "imported"), rows), hf_logits(hf, rows)
        assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(found, wanted, strict=True))
    finally:
        del DECODERS["mistral"]


SIGNAL = {
    "types.py": (
        '    text_only_log_probs: Float[Tensor, "*batch time"] | None = None\n',
        '    surprise: Float[Tensor, "*batch time"] | None = None\n',
    ),
    "training/scoring.py": (
        "                audio_signal=None if signal is None else signal[number],\n",
        "                surprise=-ref_log_probs[number],\n",
    ),
    "objective/metrics.py": (
        '        "train/entropy_nats": _mean(inputs.entropy_nats, kept),\n',
        '        "train/surprise": _mean(inputs.surprise, kept),\n',
    ),
}
"""By file: a line, and what a new signal adds before or after it."""


def test_a_signal_takes_a_line_where_it_is_declared_one_where_it_is_made_and_one_where_it_is_read(corpus, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(ROOT / "nemo_mapo", copy / "nemo_mapo", ignore=shutil.ignore_patterns("__pycache__"))
    for name, (line, added) in SIGNAL.items():
        path = copy / "nemo_mapo" / name
        source = path.read_text()
        assert source.count(line) == 1, f"{name} has changed: {line!r}"
        path.write_text(source.replace(line, added + line))
    asked = command(
        corpus, tmp_path / "run", "trainer.mapo.max_steps=2", "model.packed_tokens=512", "data.test_ds=null"
    )
    # An interpreter of its own, because the package is another.
    done = subprocess.run(asked, env=environment(PYTHONPATH=str(copy)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = [record for record in metrics(tmp_path / "run") if "train/surprise" in record]
    assert len(steps) == 2 and all(record["train/surprise"] > 0 for record in steps)
