"""Small corpora in the layouts of the real ones, written from scratch: noise for audio, our own sentences for text."""

import csv
import json
from pathlib import Path

import numpy as np
import soundfile
from lhotse import CutSet, MonoCut, Recording
from lhotse.shar import SharWriter

from nemo_mapo.data.importers.base import Source

RATE = 16000
SECONDS = 0.4


def clip(path, *, seed=None, rate=RATE, seconds=SECONDS, channels=1):
    """An audio file of noise; the same seed gives the same noise, by default every path its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(list(str(path).encode()) if seed is None else seed)
    samples = noise.uniform(-0.3, 0.3, (round(rate * seconds), channels))
    soundfile.write(path, samples, rate)
    return path


def write_json(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_csv(path, header, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def avqa(root):
    def question(number, video, answer):
        return {
            "id": number,
            "video_name": video,
            "video_id": number + 100,
            "question_text": "What happened in the video?",
            "multi_choice": ["motorboat ", "sawing wood", "rain", "a choir sings"],
            "answer": answer,
            "question_relation": "Both",
            "question_type": "Happening",
        }

    train = [question(1, "-Abc_000030", 1), question(2, "-Abc_000030", 0), question(3, "xyz_000010", 2)]
    write_json(root / "train_qa.json", train)
    write_json(root / "val_qa.json", [question(1, "q-w_000120", 3)])
    for video in ("-Abc_000030", "xyz_000010", "q-w_000120"):
        clip(root / "audio" / f"{video}.wav")
    return Source(path=root)


CLASSES = {
    "/m/animal": "Animal",
    "/m/dog": "Dog",
    "/m/bark": "Bark",
    "/m/cat": "Cat",
    "/m/rain": "Rain",
    "/m/engine": "Engine",
    "/m/violin": "Violin, fiddle",
}


def audioset(root):
    write_csv(
        root / "class_labels_indices.csv",
        ["index", "mid", "display_name"],
        *([number, mid, name] for number, (mid, name) in enumerate(CLASSES.items())),
    )
    children = {"/m/animal": ["/m/dog", "/m/cat"], "/m/dog": ["/m/bark"]}
    write_json(
        root / "ontology.json",
        [{"id": mid, "name": name, "child_ids": children.get(mid, [])} for mid, name in CLASSES.items()],
    )
    header = "# Segments csv\n# num_ytids=2\n# YTID, start_seconds, end_seconds, positive_labels\n"
    (root / "balanced_train_segments.csv").write_text(
        header + '--dog, 30.000, 40.000, "/m/animal,/m/dog,/m/bark"\nrain, 0.000, 10.000, "/m/rain"\n'
    )
    (root / "eval_segments.csv").write_text(header + 'strings, 5.000, 15.000, "/m/violin,/m/engine"\n')
    clip(root / "audio" / "balanced_train" / "Y--dog.flac")
    clip(root / "audio" / "balanced_train" / "rain.flac")
    clip(root / "audio" / "eval" / "strings_5.000_15.000.flac")
    return Source(path=root)


def tacos(root):
    clips = {"1.mp3": "Animals", "2.mp3": "Water", "3.mp3": "Animals", "4.mp3": "Water"}
    write_csv(root / "metadata.csv", ["filename", "freesound_id", "superclass"], *([a, 7, b] for a, b in clips.items()))
    write_csv(root / "annotations_weak.csv", ["filename", "text"], *([a, f"All of {b}."] for a, b in clips.items()))
    write_csv(
        root / "annotations_strong.csv",
        ["filename", "text", "onset", "offset"],
        ["1.mp3", "A dog barks.", 0.0, 0.2],
        ["1.mp3", "A dog barks loudly, close by.", 0.1, 0.3],
        ["1.mp3", "A door is shut.", 0.3, 0.4],
        ["2.mp3", "Rain falls on a roof.", 0.0, 0.4],
        ["3.mp3", "A cat purrs.", 0.0, 0.4],
        ["4.mp3", "Waves break.", 0.0, 0.4],
    )
    write_csv(root / "development_split.csv", ["filename"], ["1.mp3"], ["2.mp3"])
    write_csv(root / "test_split.csv", ["filename"], ["3.mp3"], ["4.mp3"])
    for name in clips:
        clip(root / "audio" / name)
    return Source(path=root)


def libritts_r(root):
    for part, speaker in (("train-clean-100", "84"), ("dev-clean", "85"), ("test-clean", "86")):
        folder = root / part / speaker / "121123"
        stem = f"{speaker}_121123"
        names = [f"{stem}_000000_{number:06d}" for number in range(5)]
        for name in names:
            clip(folder / f"{name}.wav")
        (folder / f"{stem}.trans.tsv").write_text(
            "".join(f"{name}\tSentence No. {i}.\tSentence number {i}.\n" for i, name in enumerate(names))
        )
        (folder / f"{stem}.book.tsv").write_text("".join(f"{name}\ttext\t0\t0\t20.5\n" for name in names))
    (root / "SPEAKERS.txt").write_text("; ID |SEX|SUBSET|MINUTES|NAME\n84 | F | train-clean-100 | 25.0 | someone\n")
    return Source(path=root)


def iemocap(root):
    for session in range(1, 6):
        dialogue = f"Ses0{session}F_impro01"
        home = root / f"Session{session}"
        turns = [("F000", "neu"), ("F001", "exc"), ("M000", "xxx")]
        lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
        for number, (turn, emotion) in enumerate(turns):
            clip(home / "sentences" / "wav" / dialogue / f"{dialogue}_{turn}.wav")
            lines += [
                f"[{number}.2901 - {number}.9357]\t{dialogue}_{turn}\t{emotion}\t[2.5000, 2.5000, 2.5000]",
                "C-E2:\tNeutral;\t()",
                "A-E3:\tval 3; act 2; dom  2;\t()",
                "",
            ]
        (home / "dialog" / "EmoEvaluation").mkdir(parents=True)
        (home / "dialog" / "EmoEvaluation" / f"{dialogue}.txt").write_text("\n".join(lines))
    return Source(path=root)


def musiccaps(root):
    header = ["ytid", "start_s", "end_s", "audioset_positive_labels", "aspect_list", "caption", "author_id"]
    header += ["is_balanced_subset", "is_audioset_eval"]
    clips = [
        ("-0Gj8", ["low quality", "piano"], "Someone plays the piano.", False),
        ("abc", ["rock", "drums"], "A rock band with drums.", False),
        ("def", ["piano", "sad"], "A sad piano, recorded well.", False),
        ("ghi", ["choir"], "A choir sings in a church.", True),
        ("jkl", ["techno"], "A fast techno beat.", True),
    ]
    write_csv(
        root / "musiccaps-public.csv",
        header,
        *([name, 30, 40, "/m/04rlf", repr(aspects), text, 4, False, test] for name, aspects, text, test in clips),
    )
    for name, *_ in clips[1:]:
        clip(root / "audio" / f"{name}.wav")
    clip(root / "audio" / "[-0Gj8]-[30-40].wav")
    return Source(path=root)


def cochlscene(root):
    for folder, scenes in (
        ("Train", ("Bus", "SubwayStation", "Cafe", "Kitchen", "Park")),
        ("Val", ("Bus", "Park")),
        ("Test", ("SubwayStation",)),
    ):
        for scene in scenes:
            clip(root / folder / scene / f"{scene}_user0001_{folder}_001.wav")
    return Source(path=root)


def audioskills(root):
    def record(name, prompt, reply, sound=None):
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": reply}]
        return {"id": name, "sound": sound or f"{name}.wav", "duration": SECONDS, "conversations": turns}

    prompt = (
        "<sound>\nHow many taps are heard? Choose the correct option from the following options:\n(A) one\n(B) two\n"
    )
    records = [
        record("a", prompt + "(C) three", "(B) two"),
        record("b", "<sound>\nWhich key is it? (A) C. (B) C#. (C) D.", "(A) C"),
        record("c", "<sound>\nDescribe the sound.", "A tap drips."),
        record("d", "<sound-1><sound-2> Are they alike? (A) yes (B) no", "(A) yes", sound=["a.wav", "b.wav"]),
    ]
    write_json(root / "counting_train.json", records)
    for name in "ab":
        clip(root / "sounds" / f"{name}.wav")
    return Source(path=root, audio_dir=root / "sounds")


def multiple_choice(root):
    def messages(content):
        return [{"role": "system", "content": "Listen."}, {"role": "user", "content": content}]

    listed = "What barks? Please choose the answer from the following options: ['a cat', 'a dog', 'a [toy] dog']."
    parts = [{"type": "audio", "audio": "2.wav"}, {"type": "text", "text": "Which key?\nA. C\nB. C#\nAnswer briefly."}]
    write_lines(
        root / "train.jsonl",
        [
            {"messages": messages(f"<audio>{listed} Output the final answer in <answer> </answer>."),
             "audios": ["1.wav"], "solution": "<answer>a dog</answer>"},
            {"messages": messages(parts), "audios": ["2.wav"], "solution": "B"},
        ],
    )  # fmt: skip
    write_lines(
        root / "test.jsonl",
        [
            {"id": "t1", "audio": "3.wav", "question": "Who speaks?", "choices": ["a man", "a woman"],
             "answer": "a man", "task": "speaker", "reasoning": "<think>It is low.</think> a man"},
            {"id": "t2", "audio_path": "3.wav", "question_text": "How many?", "multi_choice": ["A. 1", "B. 10"],
             "answer": 1},
        ],
    )  # fmt: skip
    for number in (1, 2, 3):
        clip(root / f"{number}.wav")
    return Source(path=root)


def hf_folder(root):
    import pyarrow
    from datasets import Audio, Dataset
    from pyarrow import parquet

    question = "How many animals are there in the video?\nChoices:\nA. 3\nB. One"
    content = clip(root / "spare" / "1.wav").read_bytes()
    rows = {"audio": [{"bytes": content, "path": "1.wav"}], "question": [question], "answer": ["B. One"], "id": ["p1"]}
    (root / "data").mkdir()
    parquet.write_table(pyarrow.table(rows), root / "data" / "train-00000-of-00001.parquet")
    saved = Dataset.from_dict(
        {
            "audio": [str(clip(root / "spare" / "2.wav"))],
            "question": ["Rain?"],
            "choices": [["yes", "no"]],
            "answer": [0],
        }
    )
    saved.cast_column("audio", Audio()).save_to_disk(str(root / "validation"))
    row = {"file_name": "3.wav", "question": "Loud?", "choices": ["yes", "no"], "answer": "no"}
    write_lines(root / "test" / "metadata.jsonl", [row])
    clip(root / "test" / "3.wav")
    return Source(path=root)


def nemo(root):
    fields = {"question": "Who?", "choices": ["a man", "a woman"], "answer": "a woman", "task": "speaker"}
    long = clip(root / "wav" / "long.wav", seconds=1.0)
    records = [
        {"audio_filepath": "wav/long.wav", "offset": 0.1, "duration": 0.4, "id": "one", **fields},
        {"audio_filepath": str(long), "offset": 0.5, "duration": 0.5, **fields},
        {"audio_filepath": "wav/gone.wav", "duration": 0.5, "_skipme": True, **fields},
    ]
    write_lines(root / "manifest_train.json", records)
    return Source(path=root)


def shar(root):
    custom = {"question": "Who?", "choices": ["a man", "a woman"], "answer": "a man", "task": "speaker"}
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        with SharWriter(str(root / split), fields={"recording": "flac"}, shard_size=2) as writer:
            for number in range(3):
                recording = Recording.from_file(clip(root / "spare" / f"{split}-{number}.wav"))
                cut = MonoCut(
                    id=f"{split}-{number}", start=0, duration=SECONDS, channel=0, recording=recording, custom=custom
                )
                writer.write(cut)
    return Source(path=root)


BUILDERS = {
    build.__name__: build
    for build in (
        avqa, audioset, tacos, libritts_r, iemocap, musiccaps, cochlscene, audioskills, multiple_choice, hf_folder,
        nemo, shar,
    )
}  # fmt: skip


def cuts_of(output: Path, split):
    """The cuts of a split as they stand in the manifest, by id."""
    return {cut.id: cut for cut in CutSet.from_file(output / f"cuts_{split}.jsonl.gz")}
