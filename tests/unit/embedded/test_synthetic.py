import hashlib
import json
from collections import Counter, defaultdict

import pytest
from pydantic import ValidationError

from nemo_mapo.data.manifests import example_from_cut, load_cuts
from nemo_mapo.data.splits import SPLITS, manifest_path, tokenizer_path
from nemo_mapo.data.tokenizer import load_tokenizer
from nemo_mapo.embedded.synthetic import (
    STAMP_NAME,
    SyntheticCorpusConfig,
    TaskSharesConfig,
    fingerprint,
    plan_clip,
    plan_split,
    recipe,
    write_corpus,
)
from nemo_mapo.embedded.synthetic_text import ATTRIBUTES, KINDS, TASKS, events_from_custom, loudest_event

SMALL = SyntheticCorpusConfig(train=20, validation=6, test=10, seed=5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpora") / "small"
    assert write_corpus(SMALL, path, progress=False)
    return path


def content_hashes(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_the_same_parameters_give_the_same_bytes(corpus, tmp_path):
    write_corpus(SMALL, tmp_path / "again", progress=False)
    assert content_hashes(tmp_path / "again") == content_hashes(corpus)


def test_no_two_clips_of_any_splits_share_audio(corpus):
    hashes = [digest for name, digest in content_hashes(corpus).items() if name.endswith(".flac")]
    assert len(hashes) == 36 == len(set(hashes))


def test_a_clip_does_not_depend_on_the_size_of_its_split():
    few = {clip.example.id: clip for clip in plan_split(SMALL, "train")}
    many = {clip.example.id: clip for clip in plan_split(SyntheticCorpusConfig(seed=5), "train")}
    assert len(few) == 20 and all(many[name] == clip for name, clip in few.items())


def test_another_seed_gives_other_clips():
    assert plan_clip(0, "train", "attribute", 0) != plan_clip(1, "train", "attribute", 0)


@pytest.mark.parametrize("split", SPLITS)
def test_guessing_without_ears_scores_one_in_four(split):
    clips = plan_split(SyntheticCorpusConfig(), split)
    by_question, by_position = defaultdict(Counter), Counter()
    for clip in clips:
        example = clip.example
        by_question[example.question][example.answer] += 1
        by_position[example.choices.index(example.answer)] += 1
        assert len(set(example.choices)) == 4
    # The best blind guess knows the answer that is most frequent for each question.
    best_guess = sum(max(answers.values()) for answers in by_question.values()) / len(clips)
    assert best_guess < 0.28
    assert max(by_position.values()) / len(clips) < 0.26


def test_the_choices_are_the_same_set_whatever_the_answer():
    sets = defaultdict(set)
    for clip in plan_split(SyntheticCorpusConfig(), "test"):
        sets[clip.example.question].add(frozenset(clip.example.choices))
    assert all(len(found) == 1 for found in sets.values())


def test_every_answer_is_true_of_the_sounds():
    seen = Counter()
    for clip in plan_split(SyntheticCorpusConfig(), "test"):
        example, events = clip.example, clip.events
        seen[example.task] += 1
        kinds = [event.kind for event in events]
        assert len(set(kinds)) == len(kinds)
        if example.task == "attribute":
            (asked,) = [event for event in events if event.kind in example.question]
            truth = asked.attribute
        elif example.task == "order":
            truth = kinds[0] if "first" in example.question else kinds[-1]
        elif example.task == "loudness":
            loudest = loudest_event(events)
            assert loudest is not None
            truth = loudest.kind
        else:
            truth = ("one", "two", "three", "four")[len(events) - 1]
        assert example.answer == truth
    assert seen == {"attribute": 420, "order": 84, "loudness": 48, "count": 48}


def test_sounds_follow_each_other_with_gaps_and_one_is_clearly_loudest():
    for clip in plan_split(SyntheticCorpusConfig(), "train"):
        ends = [event.start_seconds + event.duration_seconds for event in clip.events]
        starts = [event.start_seconds for event in clip.events]
        assert starts[0] > 0 and ends[-1] < 2.0
        assert all(start - end > 0.02 for end, start in zip(ends, starts[1:], strict=False))
        assert len(clip.events) == 1 or loudest_event(clip.events) is not None
        low, high = (0.36, 0.42) if clip.example.task == "count" else (0.42, 0.58)
        assert all(low <= event.duration_seconds <= high for event in clip.events)


def test_manifests_carry_the_custom_fields(corpus):
    cuts = list(load_cuts(manifest_path(corpus, "test")))
    assert len(cuts) == 10
    for cut in cuts:
        example = example_from_cut(cut)
        assert example.task in TASKS
        assert example.reasoning.endswith(f"</think> {example.answer}")
        assert cut.custom["caption"].split("hear")[1] in example.reasoning or example.reasoning.count("there is")
        assert all(
            event.kind in KINDS and event.attribute in ATTRIBUTES[event.kind]
            for event in events_from_custom(cut.custom)
        )
        assert cut.load_audio().shape == (1, 32000) and cut.sampling_rate == 16000


def test_the_tokenizer_comes_with_the_corpus(corpus):
    assert load_tokenizer(tokenizer_path(corpus)).encode(" rising")


def test_a_corpus_that_is_there_is_not_made_again(corpus):
    before = (corpus / STAMP_NAME).stat().st_mtime_ns
    assert not write_corpus(SMALL, corpus, progress=False)
    assert (corpus / STAMP_NAME).stat().st_mtime_ns == before


def test_other_parameters_replace_a_corpus_of_ours(tmp_path):
    for size in (2, 3):
        config = SyntheticCorpusConfig(train=size, validation=0, test=0)
        assert write_corpus(config, tmp_path / "c", progress=False)
        assert len(list((tmp_path / "c" / "audio" / "train").iterdir())) == size
        assert json.loads((tmp_path / "c" / STAMP_NAME).read_text())["fingerprint"] == fingerprint(recipe(config))


def test_a_directory_with_other_content_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match="not a synthetic corpus"):
        write_corpus(SMALL, tmp_path / "mine", progress=False)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "all of it"


def test_an_interrupted_run_leaves_no_corpus_and_the_next_one_writes_it(tmp_path):
    (tmp_path / ".c.partial" / "audio" / "train").mkdir(parents=True)
    config = SyntheticCorpusConfig(train=1, validation=0, test=0)
    assert write_corpus(config, tmp_path / "c", progress=False)
    assert not (tmp_path / ".c.partial").exists()


def test_impossible_parameters_are_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        SyntheticCorpusConfig(train=-1)
    with pytest.raises(ValidationError, match="add up to"):
        TaskSharesConfig(attribute=0.9)
