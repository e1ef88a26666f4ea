"""Batches through NeMo's Lhotse dataloading: what arrives, in which order, on which rank, and after a restart."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse.shar import SharWriter
from torch.utils.data import DataLoader

from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.data.dataset import PromptDataset, build_dataloader, num_batches_per_epoch, skip_batches
from nemo_mapo.data.manifests import load_cuts, validate_manifest
from nemo_mapo.data.splits import manifest_path, tokenizer_path
from nemo_mapo.data.tokenizer import load_tokenizer
from nemo_mapo.embedded.synthetic import SyntheticCorpusConfig, write_corpus
from nemo_mapo.types import Wording

pytestmark = pytest.mark.integration

SHIPPED = Path(__file__).parents[2] / "data" / "lhotse_manifests"
BATCH = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpora") / "corpus"
    write_corpus(SyntheticCorpusConfig(train=26, validation=5, test=1), path, progress=False)
    return path


@pytest.fixture(scope="module")
def inputs(corpus):
    """The training split in each of the three forms, and the validation split."""
    cuts = load_cuts(manifest_path(corpus, "train"))
    lines = [
        {"id": cut.id, "audio_filepath": f"audio/train/{cut.id}.flac", "duration": cut.duration, **cut.custom}
        for cut in cuts
    ]
    (corpus / "nemo.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (corpus / "shar").mkdir()
    with SharWriter(str(corpus / "shar"), fields={"recording": "flac"}, shard_size=7) as writer:
        for cut in cuts:
            writer.write(cut)
    return {
        "lhotse": {"type": "lhotse", "cuts_path": str(manifest_path(corpus, "train"))},
        "nemo": {"type": "nemo", "manifest_filepath": str(corpus / "nemo.json")},
        "lhotse_shar": {"type": "lhotse_shar", "shar_path": str(corpus / "shar")},
        "validation": {"type": "lhotse", "cuts_path": str(manifest_path(corpus, "validation"))},
    }


@pytest.fixture(scope="module")
def dataset(corpus):
    return PromptDataset(load_tokenizer(tokenizer_path(corpus)), lambda samples: samples // 1280, Wording())


@pytest.fixture
def load(inputs, dataset):
    """Build a dataloader over the named inputs."""

    def build(*names, rank=0, world_size=1, drop_last=False, **options):
        config = DatasetConfig(
            input_cfg=tuple(inputs[name] for name in names), **{"batch_size": BATCH, "shuffle": True, **options}
        )
        validate_manifest(config)
        return build_dataloader(config, prompt_dataset=dataset, rank=rank, world_size=world_size, drop_last=drop_last)

    return build


def ids(loader):
    return [tuple(problem.example.id for problem in batch) for batch in loader]


def flat(batches):
    return [name for batch in batches for name in batch]


EVERY_FORM = pytest.mark.parametrize(
    "names",
    [("lhotse",), ("nemo",), ("lhotse_shar",), ("lhotse", "validation"), ("lhotse_shar", "validation")],
    ids="+".join,
)


@pytest.mark.parametrize("name", ["lhotse", "nemo", "lhotse_shar"])
def test_the_three_forms_give_the_same_questions_and_audio(load, name):
    expected = {}
    for batch in load("lhotse", shuffle=False):
        for problem in batch:
            expected[problem.example.id] = problem
    seen = 0
    for batch in load(name, shuffle=False):
        for problem in batch:
            known = expected[problem.example.id]
            # Where a clip lies differs: an archive has no path.
            assert replace(problem.example, clips=()) == replace(known.example, clips=())
            assert torch.equal(problem.prompt.clips[0], known.prompt.clips[0])
            assert torch.equal(problem.prompt.token_ids, known.prompt.token_ids)
            seen += 1
    assert seen == len(expected) == 26


@EVERY_FORM
def test_an_epoch_visits_every_cut_once_and_its_batches_are_counted(load, names):
    loader = load(*names)
    batches = ids(loader)
    assert num_batches_per_epoch(loader) == len(batches)
    assert len(flat(batches)) == len(set(flat(batches))) == (31 if "validation" in names else 26)


@EVERY_FORM
def test_epochs_are_reproducible_and_differ(load, names):
    first, second = load(*names), load(*names)
    skip_batches(first, 0)
    zero = ids(first)
    skip_batches(first, 1)
    one = ids(first)
    skip_batches(second, 1)
    assert ids(second) == one != zero
    assert set(flat(one)) == set(flat(zero))


@EVERY_FORM
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_a_restart_in_the_middle_continues_with_the_next_batch(load, names, rank, world_size):
    whole = load(*names, rank=rank, world_size=world_size)
    skip_batches(whole, 3)
    expected = ids(whole)
    for done in (0, 1, len(expected)):
        again = load(*names, rank=rank, world_size=world_size)
        skip_batches(again, 3, done)
        assert ids(again) == expected[done:]


@EVERY_FORM
def test_ranks_share_an_epoch_without_overlap(load, names):
    per_rank = [ids(load(*names, rank=rank, world_size=2)) for rank in range(2)]
    assert len(per_rank[0]) == len(per_rank[1])
    assert not set(flat(per_rank[0])) & set(flat(per_rank[1]))
    assert len(flat(per_rank[0] + per_rank[1])) == (31 if "validation" in names else 26)


def test_without_shuffling_the_order_is_that_of_the_manifest(load, corpus):
    order = [cut.id for cut in load_cuts(manifest_path(corpus, "train"))]
    assert flat(ids(load("lhotse", shuffle=False))) == order


def test_a_last_partial_batch_is_dropped_on_demand(load):
    assert [len(batch) for batch in ids(load("lhotse"))][-1] == 2
    assert {len(batch) for batch in ids(load("lhotse", drop_last=True))} == {BATCH}


@pytest.mark.parametrize("name", ["lhotse", "nemo", "lhotse_shar"])
def test_max_samples_keeps_to_the_same_few_cuts(load, name):
    few = load(name, max_samples=6)
    seen = set(flat(ids(few)))
    skip_batches(few, 1)
    assert len(seen) == 6 and set(flat(ids(few))) == seen
    if name == "lhotse":
        assert seen == set(flat(ids(load("lhotse", shuffle=False)))[:6])


def test_tags_reach_the_examples(inputs, dataset):
    item = {**inputs["lhotse"], "tags": {"task": "music"}}
    loader = build_dataloader(DatasetConfig(input_cfg=(item,), batch_size=BATCH), prompt_dataset=dataset)
    assert {problem.example.task for batch in loader for problem in batch} == {"music"}


def test_loading_leaves_the_global_random_state_alone(load):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    ids(load("lhotse", max_samples=5))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_a_corpus_that_was_moved_is_read_from_another_directory(tmp_path, dataset, monkeypatch):
    shutil.copytree(SHIPPED, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for item in (
        {"type": "lhotse", "cuts_path": "elsewhere/cuts_train.jsonl.gz"},
        {"type": "nemo", "manifest_filepath": "elsewhere/nemo_train.json"},
    ):
        config = DatasetConfig(input_cfg=(item,))
        assert validate_manifest(config).used == 4
        assert len(flat(ids(build_dataloader(config, prompt_dataset=dataset)))) == 4


def test_a_damaged_clip_is_named_when_its_batch_is_read(tmp_path, dataset):
    shutil.copytree(SHIPPED, tmp_path / "c")
    victim = next((tmp_path / "c" / "audio" / "train").iterdir())
    victim.write_bytes(victim.read_bytes()[:-2000])
    config = DatasetConfig(input_cfg=({"type": "lhotse", "cuts_path": str(tmp_path / "c" / "cuts_train.jsonl.gz")},))
    assert validate_manifest(config).used == 4
    with pytest.raises(ValueError, match=f"cut {victim.stem} .*{victim.name}.*truncated"):
        ids(build_dataloader(config, prompt_dataset=dataset))


def test_a_broken_off_shar_archive_is_refused(tmp_path, inputs, dataset):
    shutil.copytree(inputs["lhotse_shar"]["shar_path"], tmp_path / "shar")
    item = {"type": "lhotse_shar", "shar_path": str(tmp_path / "shar")}
    archive = tmp_path / "shar" / "recording.000001.tar"
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    config = DatasetConfig(input_cfg=(item,), batch_size=BATCH)
    with pytest.raises(ValueError, match=r"archive .* damaged"):
        ids(build_dataloader(config, prompt_dataset=dataset))
    archive.unlink()
    with pytest.raises(ValueError, match=r"no recording\.000001\.tar beside .*the Shar directory is incomplete"):
        validate_manifest(config)


def test_only_our_dataloaders_can_be_positioned():
    with pytest.raises(ValueError, match="only those of build_dataloader"):
        skip_batches(DataLoader([1, 2]), 0)
