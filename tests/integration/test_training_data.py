"""What a training run draws: mixtures, phases, duration buckets, clips that cannot be read; also after a restart."""

import itertools

import pytest
from lhotse import CutSet

from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.data.dataset import PromptDataset, build_dataloader
from nemo_mapo.data.manifests import load_cuts, validate_manifest
from nemo_mapo.data.splits import manifest_path, tokenizer_path
from nemo_mapo.data.tokenizer import load_tokenizer
from nemo_mapo.embedded.synthetic import SyntheticCorpusConfig, write_corpus
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.training.prompts import PromptPhase, PromptStream
from nemo_mapo.types import Wording

pytestmark = pytest.mark.integration
BATCH = 4


@pytest.fixture(scope="module", autouse=True)
def one_process():
    install_cpu_host()
    initialize_parallel()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("training_data") / "corpus"
    write_corpus(SyntheticCorpusConfig(train=24, validation=12, test=1), path, progress=False)
    return path


@pytest.fixture(scope="module")
def sources(corpus):
    return {name: {"type": "lhotse", "cuts_path": str(manifest_path(corpus, name))} for name in ("train", "validation")}


def stream(corpus, *, max_unreadable=0, **options):
    split = DatasetConfig(**{"batch_size": BATCH, "shuffle": True, "max_unreadable": max_unreadable, **options})
    phases = []
    for phase in split.in_phases():
        dataset = PromptDataset(
            load_tokenizer(tokenizer_path(corpus)),
            lambda samples: samples // 1280,
            Wording(),
            replace_unreadable=max_unreadable > 0,
        )
        loader = build_dataloader(phase.split, prompt_dataset=dataset, drop_last=True)
        phases.append(PromptPhase(name=phase.name, dataloader=loader, steps=phase.steps))
    return PromptStream(phases, BATCH, max_unreadable=max_unreadable)


def drawn(prompts, batches):
    return [
        tuple(problem.example.id for problem in batch)
        for batch in itertools.islice(iter(prompts.__next__, None), batches)
    ]


def share_of_train(batches):
    names = list(itertools.chain(*batches))
    return sum(name.startswith("train") for name in names) / len(names)


def mixture(sources, weights):
    return {
        "input_cfg": tuple({**sources[name], "weight": weight} for name, weight in weights.items()),
        "infinite": True,
    }


def test_an_infinite_mixture_draws_from_each_item_as_often_as_its_weight_says(corpus, sources):
    batches = drawn(stream(corpus, **mixture(sources, {"train": 1, "validation": 3})), 150)
    assert share_of_train(batches) == pytest.approx(0.25, abs=0.06)
    assert share_of_train(drawn(stream(corpus, **mixture(sources, {"train": 3, "validation": 1})), 150)) > 0.65


def test_a_clip_that_is_drawn_again_keeps_its_id(corpus, sources):
    names = set(itertools.chain(*drawn(stream(corpus, **mixture(sources, {"train": 1, "validation": 3})), 60)))
    assert names <= {cut.id for name in sources for cut in load_cuts(manifest_path(corpus, name))}


def test_an_infinite_mixture_of_few_samples_draws_them_again(corpus, sources):
    names = itertools.chain(*drawn(stream(corpus, **mixture(sources, {"train": 1, "validation": 1}), max_samples=8), 6))
    assert len(set(names)) == 8


def curriculum(sources):
    return {
        "phases": (
            {"name": "first", "input_cfg": (sources["validation"],), "steps": 5},
            {"name": "second", "input_cfg": (sources["train"], sources["validation"]), "steps": 4},
        )
    }


def test_phases_follow_each_other_for_their_numbers_of_steps(corpus, sources):
    prompts = stream(corpus, **curriculum(sources))
    first = drawn(prompts, 5)
    assert share_of_train(first) == 0
    # Three batches are all of the first phase's clips: it went on with a second epoch.
    assert len(set(itertools.chain(*first[:3]))) == 12
    assert prompts.metrics() == {"data/phase": 1.0}
    assert share_of_train(drawn(prompts, 4)) > 0.4
    assert prompts.metrics() == {"data/phase": 2.0}


BINS = (0.75, 1.25)


@pytest.fixture(scope="module")
def unequal(corpus, tmp_path_factory):
    """The training clips cut to three lengths, one for each duration bucket."""
    lengths = itertools.cycle((0.5, 1.0, 1.5))
    cuts = [
        cut.truncate(duration=seconds)
        for cut, seconds in zip(load_cuts(manifest_path(corpus, "train")), lengths, strict=False)
    ]
    path = tmp_path_factory.mktemp("unequal") / "cuts.jsonl.gz"
    CutSet.from_cuts(cuts).to_file(path)
    return {"type": "lhotse", "cuts_path": str(path)}


def test_with_duration_buckets_the_clips_of_a_batch_are_of_one_length(corpus, unequal):
    def lengths(**options):
        prompts = stream(corpus, input_cfg=(unequal,), **options)
        batches = itertools.islice(iter(prompts.__next__, None), 6)
        return [{len(problem.prompt.clips[0]) for problem in batch} for batch in batches]

    assert all(len(found) == 1 for found in lengths(bucket_duration_bins=BINS))
    assert set().union(*lengths(bucket_duration_bins=BINS)) == {8000, 16000, 24000}
    assert any(len(found) > 1 for found in lengths())


@pytest.mark.parametrize("mode", ["finite", "infinite", "phases", "buckets"])
def test_a_stream_goes_on_exactly_where_another_stopped(corpus, sources, unequal, mode):
    options = {
        "finite": {"input_cfg": (sources["train"],)},
        "infinite": mixture(sources, {"train": 1, "validation": 3}),
        "phases": curriculum(sources),
        "buckets": {"input_cfg": (unequal,), "bucket_duration_bins": BINS},
    }[mode]
    whole = stream(corpus, **options)
    expected = drawn(whole, 9)
    for stop in (3, 5):
        before = stream(corpus, **options)
        drawn(before, stop)
        after = stream(corpus, **options)
        after.load_state_dict(before.state_dict())
        assert drawn(after, 9 - stop) == expected[stop:]


@pytest.fixture
def damaged(tmp_path):
    """A corpus of its own with two clips that break off."""
    path = tmp_path / "damaged"
    write_corpus(SyntheticCorpusConfig(train=8, validation=1, test=1), path, progress=False)
    broken = sorted((path / "audio" / "train").iterdir())[:2]
    for file in broken:
        file.write_bytes(file.read_bytes()[:3000])
    return path, {file.stem for file in broken}


def test_a_clip_that_cannot_be_read_is_replaced_counted_and_remembered(damaged):
    path, broken = damaged
    source = {"type": "lhotse", "cuts_path": str(manifest_path(path, "train"))}
    prompts = stream(path, input_cfg=(source,), max_unreadable=2)
    batches = drawn(prompts, 2)
    assert all(len(batch) == BATCH for batch in batches)
    assert not broken & set(itertools.chain(*batches))
    assert prompts.unreadable == broken and prompts.metrics() == {"data/unreadable_clips": 2.0}
    again = stream(path, input_cfg=(source,), max_unreadable=2)
    again.load_state_dict(prompts.state_dict())
    assert again.unreadable == broken


def rows_of_ranks(path, share):
    """The examples of every batch, put together from ranks that read `share` rows each."""
    split = DatasetConfig(
        input_cfg=({"type": "lhotse", "cuts_path": str(manifest_path(path, "train"))},),
        batch_size=BATCH,
        shuffle=True,
        max_unreadable=2,
    )
    ranks = []
    for first in range(0, BATCH, share):
        dataset = PromptDataset(
            load_tokenizer(tokenizer_path(path)),
            lambda samples: samples // 1280,
            Wording(),
            rows=list(range(first, first + share)),
            replace_unreadable=True,
        )
        loader = build_dataloader(split, prompt_dataset=dataset, drop_last=True)
        ranks.append([[problem.example.id for problem in batch] for batch in loader])
    return [list(itertools.chain(*batch)) for batch in zip(*ranks, strict=True)]


@pytest.mark.parametrize("share", [1, 2])
def test_what_stands_in_for_a_clip_does_not_depend_on_the_number_of_ranks(damaged, share):
    path, _ = damaged
    assert rows_of_ranks(path, share) == rows_of_ranks(path, BATCH)


@pytest.mark.parametrize("share", [1, 2])
def test_ranks_have_all_rows_of_a_batch_between_them_and_none_twice(corpus, share):
    batches = rows_of_ranks(corpus, share)
    assert batches == rows_of_ranks(corpus, BATCH)
    assert all(len(set(batch)) == BATCH for batch in batches)


@pytest.mark.parametrize("harm", ["missing", "no audio"])
def test_before_the_start_files_that_cannot_be_read_are_borne_up_to_the_ceiling(damaged, harm, caplog):
    path, broken = damaged
    for name in broken:
        file = path / "audio" / "train" / f"{name}.flac"
        file.unlink() if harm == "missing" else file.write_bytes(b"no audio")
    source = {"type": "lhotse", "cuts_path": str(manifest_path(path, "train"))}
    assert validate_manifest(DatasetConfig(input_cfg=(source,), max_unreadable=2)).used == 8
    assert all(name in caplog.text for name in broken)
    with pytest.raises(ValueError, match="unreadable clip number 2, max_unreadable=1"):
        validate_manifest(DatasetConfig(input_cfg=(source,), max_unreadable=1))
    prompts = stream(path, input_cfg=(source,), max_unreadable=2)
    drawn(prompts, 2)
    assert prompts.unreadable == broken


@pytest.mark.parametrize("weights", [(1, None), (1, -1), (1, 0), (1, "2"), (1, float("inf"))])
def test_weights_that_are_no_shares_are_refused(sources, weights):
    items = tuple({**source, "weight": weight} for source, weight in zip(sources.values(), weights, strict=True))
    with pytest.raises(ValueError, match="weights are"):
        DatasetConfig(input_cfg=items)
    with pytest.raises(ValueError, match="weights are"):
        DatasetConfig(phases=({"name": "one", "input_cfg": items, "steps": 1},))


@pytest.mark.parametrize(
    ("ceiling", "message"), [(0, "cannot be read"), (1, "more than data.train_ds.max_unreadable=1")]
)
def test_past_the_ceiling_the_run_ends(damaged, ceiling, message):
    path, _ = damaged
    source = {"type": "lhotse", "cuts_path": str(manifest_path(path, "train"))}
    with pytest.raises(ValueError, match=message):
        drawn(stream(path, input_cfg=(source,), max_unreadable=ceiling), 2)
