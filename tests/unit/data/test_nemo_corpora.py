"""NeMo's corpora as they lie: tarred shards, lists of manifests, groups, conversations; read whole or refused."""

import gzip
import io
import json
import runpy
import shutil
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from lhotse import Recording
from lhotse.shar import AudioTarWriter

from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.data.dataset import PromptDataset, build_dataloader
from nemo_mapo.data.manifests import validate_manifest
from nemo_mapo.types import Wording
from support.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "data" / "lhotse_manifests"
LINES = [json.loads(line) for line in (SHIPPED / "nemo_train.json").read_text().splitlines()]
BATCH = 2


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def archive(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def tarred(directory, lines=LINES, first=0):
    """A corpus of two shards, as NeMo's convert_to_tarred_audio_dataset.py writes it, and its item of `input_cfg`."""
    directory.mkdir(exist_ok=True)
    for shard in range(2):
        mine = [{**line, "audio_filepath": Path(line["audio_filepath"]).name} for line in lines[shard::2]]
        jsonl(directory / f"manifest_{first + shard}.json", [{**line, "shard_id": first + shard} for line in mine])
        sounds = {Path(line["audio_filepath"]).name: line["audio_filepath"] for line in lines[shard::2]}
        archive(
            directory / f"audio_{first + shard}.tar",
            {name: (SHIPPED / path).read_bytes() for name, path in sounds.items()},
        )
    return {
        "type": "nemo_tarred",
        "manifest_filepath": f"{directory}/manifest__OP_{first}..{first + 1}_CL_.json",
        "tarred_audio_filepaths": f"{directory}/audio__OP_{first}..{first + 1}_CL_.tar",
    }


def plain(directory):
    shutil.copytree(SHIPPED / "audio", directory / "audio", dirs_exist_ok=True)
    jsonl(directory / "plain.json", LINES)
    return {"type": "nemo", "manifest_filepath": str(directory / "plain.json")}


def loader(*items, open_ended=False, **options):
    config = DatasetConfig(input_cfg=items, batch_size=BATCH, **options)
    dataset = PromptDataset(tiny_tokenizer(), lambda samples: samples // 1280, Wording(), open_ended=open_ended)
    return build_dataloader(config, prompt_dataset=dataset)


def examples(*items, **options):
    return [problem.example for batch in loader(*items, **options) for problem in batch]


def refusal(*items, **options):
    with pytest.raises(ValueError) as caught:
        validate_manifest(DatasetConfig(input_cfg=items, **options))
    return str(caught.value)


@pytest.mark.parametrize("first", [0, 3])
def test_a_tarred_corpus_is_read_as_the_same_clips_in_files(tmp_path, first):
    item = tarred(tmp_path, first=first)
    assert validate_manifest(DatasetConfig(input_cfg=(item,))).used == len(LINES)
    found, wanted = (
        {problem.example.id: (problem.example, problem.prompt.clips[0]) for batch in loader(one) for problem in batch}
        for one in (item, plain(tmp_path))
    )
    assert found.keys() == wanted.keys() and len(found) == len(LINES)
    for name, (example, waveform) in wanted.items():
        assert replace(found[name][0], clips=()) == replace(example, clips=()) and waveform.equal(found[name][1])
        assert found[name][0].clips[0].path is None and example.clips[0].path.endswith(f"{name}.flac")


def test_clips_of_different_archives_are_mixed_as_far_as_the_buffer_reaches(tmp_path):
    item = tarred(tmp_path)
    shard_of = {line["id"]: number % 2 for number, line in enumerate(LINES)}

    def changes(**options):
        order = [shard_of[example.id] for example in examples(item, shuffle=True, **options)]
        return sum(one != other for one, other in pairwise(order))

    assert [changes(seed=seed, shuffle_buffer_size=1) for seed in range(4)] == [1] * 4
    assert max(changes(seed=seed) for seed in range(4)) > 1


def test_one_manifest_may_be_about_all_archives(tmp_path):
    item = tarred(tmp_path)
    lines = [line for shard in range(2) for line in (tmp_path / f"manifest_{shard}.json").read_text().splitlines()]
    (tmp_path / "tarred_audio_manifest.json").write_text("\n".join(lines))
    item["manifest_filepath"] = str(tmp_path / "tarred_audio_manifest.json")
    assert validate_manifest(DatasetConfig(input_cfg=(item,))).used == len(examples(item)) == len(LINES)
    (tmp_path / "tarred_audio_manifest.json").write_text(lines[0].replace('"shard_id"', '"shard"'))
    assert "field 'shard_id' is None" in refusal(item)


def test_parts_of_a_member_are_cuts_of_their_own(tmp_path):
    line = {**LINES[0], "duration": 0.5}
    parts = [
        {**line, "id": f"part{n}", "offset": n / 2, "audio_filepath": f"clip-sub{n}.flac", "shard_id": 0}
        for n in range(2)
    ]
    jsonl(tmp_path / "manifest_0.json", parts)
    archive(tmp_path / "audio_0.tar", {"clip.flac": (SHIPPED / line["audio_filepath"]).read_bytes()})
    item = {
        "type": "nemo_tarred",
        "manifest_filepath": str(tmp_path / "manifest_0.json"),
        "tarred_audio_filepaths": str(tmp_path / "audio_0.tar"),
    }
    assert validate_manifest(DatasetConfig(input_cfg=(item,))).used == 2
    (batch,) = loader(item)
    samples, _ = soundfile.read(SHIPPED / line["audio_filepath"], dtype="float32")
    for problem in batch:
        start = 8000 * int(problem.example.id[-1])
        assert np.allclose(problem.prompt.clips[0], samples[start : start + 8000], atol=1e-4)
    jsonl(tmp_path / "manifest_0.json", [{key: part[key] for key in part if key != "id"} for part in parts])
    assert "about parts of clip.flac: give each an 'id'" in refusal(item)


@pytest.mark.parametrize("when", ["checked", "read"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "damaged archive: write it again"),
        ("a member is lost", "NeMo would leave these lines out"),
        ("a member is spare", "spare.flac"),
        ("a member is no audio", "not readable audio"),
    ],
)
def test_an_archive_that_nemo_would_read_in_part_is_refused(tmp_path, damage, message, when):
    item = tarred(tmp_path)
    path = tmp_path / "audio_1.tar"
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    name = next(iter(members))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "a member is lost":
        archive(path, {key: value for key, value in members.items() if key != name})
    elif damage == "a member is spare":
        archive(path, {**members, "spare.flac": members[name]})
    else:
        archive(path, {**members, name: b"no audio"})
    if when == "checked":
        assert message in refusal(item)
    else:
        with pytest.raises((ValueError, RuntimeError), match=message):
            examples(item)
    if damage == "a member is spare":
        item["skip_missing_manifest_entries"] = True
        assert validate_manifest(DatasetConfig(input_cfg=(item,))).used == len(examples(item)) == len(LINES)


def test_a_link_in_an_archive_is_refused(tmp_path):
    item = tarred(tmp_path)
    with tarfile.open(tmp_path / "audio_0.tar", "a") as tar:
        link = tarfile.TarInfo("passwd")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert "member passwd is not a regular file" in refusal(item)


def test_manifests_and_archives_of_other_shards_are_refused(tmp_path):
    item = tarred(tmp_path)
    item["tarred_audio_filepaths"] = str(tmp_path / "audio__OP_0..0_CL_.tar")
    assert "manifests are of shards [0, 1], archives of [0]" in refusal(item)


def test_archived_clips_are_checked_like_files(tmp_path):
    item = tarred(tmp_path, [{**line, "duration": 9.0} for line in LINES])
    assert "in " in refusal(item) and "the cut ends at 9.0 s but" in refusal(item)
    assert "has 16000 Hz, not sample_rate=8000" in refusal(tarred(tmp_path, [
        {key: line[key] for key in line if key != "sampling_rate"} for line in LINES
    ]), sample_rate=8000)  # fmt: skip


def test_a_group_is_drawn_by_its_weight_and_its_items_by_theirs(tmp_path):
    item = tarred(tmp_path)
    inner = [{**item, "weight": 3, "tags": {"task": "often"}}, {**item, "weight": 1, "tags": {"task": "seldom"}}]
    items = (
        {"type": "group", "weight": 0.8, "input_cfg": inner, "tags": {"caption": "of the group"}},
        {**plain(tmp_path), "weight": 0.2, "tags": {"task": "alone"}},
    )
    endless = loader(*items, infinite=True, shuffle=True)
    drawn = [problem.example for batch in islice(endless, 400) for problem in batch]
    shares = {task: count / len(drawn) for task, count in Counter(example.task for example in drawn).items()}
    # 0.8 x 3/4, 0.8 x 1/4, 0.2
    assert shares == pytest.approx({"often": 0.6, "seldom": 0.2, "alone": 0.2}, abs=0.06)
    assert {example.caption for example in drawn if example.task == "often"} == {"of the group"}


def test_lists_of_manifests_are_mixed_as_nemo_mixes_them(tmp_path):
    first = tarred(tmp_path / "a", [{**line, "task": "first"} for line in LINES])
    second = tarred(tmp_path / "b", [{**line, "task": "second", "id": f"{line['id']}b"} for line in LINES])
    both = {
        "type": "nemo_tarred",
        "manifest_filepath": [[first["manifest_filepath"], 3], [second["manifest_filepath"], 1]],
        "tarred_audio_filepaths": [[first["tarred_audio_filepaths"]], [second["tarred_audio_filepaths"]]],
    }
    assert validate_manifest(DatasetConfig(input_cfg=(both,))).used == 2 * len(LINES)
    assert Counter(example.task for example in examples(both)) == {"first": len(LINES), "second": len(LINES)}
    drawn = [problem.example.task for batch in islice(loader(both, infinite=True), 200) for problem in batch]
    assert drawn.count("first") / len(drawn) == pytest.approx(0.75, abs=0.08)


def conversation(line, **turn):
    text = f"{line['question']}\n" + "\n".join(f"{'ABCD'[n]}. {choice}" for n, choice in enumerate(line["choices"]))
    return {
        "id": line["id"],
        "task": line["task"],
        "conversations": [
            {"from": "User", "type": "text", "value": text},
            {"from": "User", "type": "audio", "value": line["audio_filepath"], "duration": line["duration"], **turn},
            {"from": "Assistant", "type": "text", "value": line["answer"]},
        ],
    }


def conversations(directory, records, **item):
    shutil.copytree(SHIPPED / "audio", directory / "audio", dirs_exist_ok=True)
    jsonl(directory / "chat.jsonl", records)
    return {"type": "multimodal_conversation", "manifest_filepath": str(directory / "chat.jsonl"), **item}


def test_a_conversation_is_the_question_that_its_turns_spell(tmp_path):
    item = conversations(tmp_path, [conversation(line) for line in LINES])
    assert validate_manifest(DatasetConfig(input_cfg=(item,))).used == len(LINES)
    found, wanted = ({e.id: e for e in examples(one)} for one in (item, plain(tmp_path)))
    for name, example in wanted.items():
        assert (found[name].question, found[name].choices, found[name].answer, found[name].task) == (
            *(example.question, example.choices, example.answer),
            example.task,
        )


def test_conversations_are_drawn_endlessly_next_to_others_under_their_own_ids(tmp_path):
    chats = conversations(tmp_path, [{**conversation(line), "id": f"chat {line['id']}"} for line in LINES])
    items = ({**chats, "weight": 1}, {**plain(tmp_path), "weight": 1})
    endless = loader(*items, infinite=True, shuffle=True)
    drawn = {problem.example.id for batch in islice(endless, 60) for problem in batch}
    assert drawn == {name for line in LINES for name in (line["id"], f"chat {line['id']}")}


def test_a_conversation_without_choices_is_for_supervised_training(tmp_path):
    record = {**conversation(LINES[0])}
    record["conversations"][0]["value"] = "Tell me <|audio|> what you hear."
    record["conversations"][2]["value"] = "A dog, and rain."
    item = conversations(tmp_path, [record], audio_locator_tag="<|audio|>")
    assert "field 'choices' is None" in refusal(item)
    assert validate_manifest(DatasetConfig(input_cfg=(item,)), open_ended=True).used == 1
    (example,) = examples(item, open_ended=True)
    assert (example.question, example.choices, example.answer) == ("Tell me  what you hear.", (), "A dog, and rain.")


def test_a_conversation_may_have_several_clips_in_files_or_archives(tmp_path):
    record = conversation(LINES[0])
    second = {**record["conversations"][1], "value": LINES[1]["audio_filepath"], "duration": LINES[1]["duration"]}
    record["conversations"].insert(2, second)
    item = conversations(tmp_path, [record])
    assert validate_manifest(DatasetConfig(input_cfg=(item,))).used == 1
    (batch,) = loader(item)
    lengths = [round(16000 * line["duration"]) for line in LINES[:2]]
    assert [[len(clip) for clip in problem.prompt.clips] for problem in batch] == [lengths]

    with AudioTarWriter(str(tmp_path / "audio_0.tar"), shard_size=None) as writer:
        for turn in record["conversations"][1:3]:
            recording = Recording.from_file(SHIPPED / turn["value"])
            turn["value"] = f"{recording.id}.flac"
            writer.write(recording.id, recording.load_audio(), recording.sampling_rate, recording)
    item = conversations(tmp_path, [record], tarred_audio_filepaths=str(tmp_path / "audio_0.tar"))
    assert validate_manifest(DatasetConfig(input_cfg=(item,))).used == 1
    (again,) = loader(item)
    assert [[len(clip) for clip in problem.prompt.clips] for problem in again] == [lengths]
    record["conversations"][1]["value"] = "lost.flac"
    assert "lost.flac not in" in refusal(conversations(tmp_path, [record], tarred_audio_filepaths=str(
        tmp_path / "audio_0.tar"
    )))  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda turns: turns.pop(1), "no turn with audio"),
        (lambda turns: turns.pop(), "turns are user text, user audio"),
        (lambda turns: turns.append({**turns[0]}), "a question here is one or more turns of a user"),
        (lambda turns: turns[0].update({"from": "System"}), "turns are system text"),
        (lambda turns: turns[1].update(type="video"), "give texts for value, from"),
        (lambda turns: turns[1].update(value="pipe:touch x"), "is a command"),
        (lambda turns: turns[1].update(value="a;b.sph"), "mean something to the shell"),
        (lambda turns: turns[1].update(duration="long"), "field 'duration' is 'long'"),
    ],
)
def test_a_conversation_that_is_no_question_about_a_clip_is_refused(tmp_path, change, message):
    record = conversation(LINES[0])
    change(record["conversations"])
    item = conversations(tmp_path, [record])
    assert message in refusal(item)


def test_a_path_beyond_the_lines_that_were_checked_is_still_looked_at_before_it_is_opened(tmp_path):
    unsafe = "audio/$(touch planted).sph"
    line = {key: value for key, value in LINES[1].items() if key != "sampling_rate"}
    item = plain(tmp_path)
    jsonl(tmp_path / "plain.json", [LINES[0], {**line, "audio_filepath": unsafe}])
    assert validate_manifest(DatasetConfig(input_cfg=(item,), check_cuts=1)).used == 1
    with pytest.raises(ValueError, match="mean something to the shell"):
        examples(item)
    chats = [conversation(LINES[0]), conversation(line, value=unsafe)]
    with pytest.raises(ValueError, match="mean something to the shell"):
        examples(conversations(tmp_path, chats))


def test_compressed_manifests_of_shards_are_read(tmp_path):
    item = tarred(tmp_path)
    for shard in range(2):
        path = tmp_path / f"manifest_{shard}.json"
        with gzip.open(f"{path}.gz", "wb") as file:
            file.write(path.read_bytes())
        path.unlink()
    item["manifest_filepath"] += ".gz"
    assert validate_manifest(DatasetConfig(input_cfg=(item,))).used == len(examples(item)) == len(LINES)


def run_example(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_the_data_page_shows_a_tarred_corpus_and_a_conversation(tmp_path, monkeypatch):
    chat = conversation(LINES[0])
    chat |= {"id": "chat", "task": "open"}
    chat["conversations"][0]["value"], chat["conversations"][2]["value"] = "What do you hear?", "A dog, and rain."
    items = [tarred(tmp_path), conversations(tmp_path, [chat])]
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"input_cfg": items}))
    run_example(monkeypatch, "inspect_data.py", tmp_path / "mixture.yaml", "--output", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert all(line["id"] in page for line in LINES) and page.count("<audio") == len(LINES) + 1
    assert "A dog, and rain." in page and "Questions, mixture" in page


def test_buckets_are_those_that_lhotse_estimates(tmp_path, monkeypatch, capsys):
    durations = [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    lines = [{**LINES[0], "id": f"q{n}", "duration": seconds} for n, seconds in enumerate(durations)]
    jsonl(tmp_path / "lines.json", [*lines, {**LINES[0], "id": "long", "duration": 99.0}])
    arguments = [tmp_path / "lines.json", "--key", "manifest_filepath", "--buckets", 3]
    run_example(monkeypatch, "estimate_duration_bins.py", *arguments)
    told = capsys.readouterr().out.splitlines()
    # 16 s in three buckets: a border once more than 16/3 s are behind it.
    assert told[-1] == "data.train_ds.bucket_duration_bins=[2,4]"
    assert [line.split(": ")[1] for line in told[-4:-1]] == ["4 clips", "2 clips", "2 clips"]
    with pytest.raises(SystemExit, match="9 buckets for 8 clips"):
        run_example(monkeypatch, "estimate_duration_bins.py", *arguments[:-1], 9)
