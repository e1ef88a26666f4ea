"""The embedded corpus: short clips of synthetic sounds with questions, written as FLAC files plus Lhotse manifests.

A clip is fixed by (seed, split, task, number in its task) alone: neither the sizes of the splits nor the order of
writing change it, and no clip of one split can occur in another.
"""

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import soundfile
from filelock import FileLock
from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment
from pydantic import Field
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from nemo_mapo.config.base import config_class
from nemo_mapo.data.splits import SPLITS, manifest_path, tokenizer_path
from nemo_mapo.embedded.synthetic_audio import CLIP_SECONDS, SAMPLE_RATE, render_clip
from nemo_mapo.embedded.synthetic_text import (
    ATTRIBUTES,
    COUNT_WORDS,
    KINDS,
    LOUD_MARGIN_DB,
    ORDER_WORDS,
    TASKS,
    Event,
    caption_text,
    question_text,
    reasoning_text,
)
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.types import Example

STAMP_NAME = "corpus.json"

_EVENTS = 3
"""Sounds per clip, except in counting clips."""
EVENT_SECONDS = (0.42, 0.58)
_COUNTED_EVENT_SECONDS = (0.36, 0.42)
"""Shorter, so that four fit; the same range for every count, so that durations do not reveal it."""
_LEAST_GAP_SECONDS = 0.03
_LOUDEST_DBFS = (-20.0, -16.0)
"""Leaves noise bursts, whose peaks stand some 13 dB above their RMS, below full scale."""
_BELOW_LOUDEST_DB = (LOUD_MARGIN_DB, 2 * LOUD_MARGIN_DB)
_DECIMALS = 4
"""Manifests state times and loudness to this many decimals, and the audio is made from the rounded values."""

Share = Annotated[float, Field(ge=0, le=1)]
ClipCount = Annotated[int, Field(ge=0)]
Option = TypeVar("Option")


@config_class
class TaskSharesConfig:
    """Shares of each split's questions by task; they add up to 1."""

    attribute: Share = 0.70
    """What a named kind of sound is like."""
    order: Share = 0.14
    """Which kind comes first or last."""
    loudness: Share = 0.08
    """Which kind is loudest."""
    count: Share = 0.08
    """How many sounds there are, one to four."""

    def __post_init__(self) -> None:
        total = sum(asdict(self).values())
        if abs(total - 1.0) > 1e-9:
            raise ValueError(f"task shares add up to {total}, not to 1: {asdict(self)}")


@config_class
class SyntheticCorpusConfig:
    """Everything the corpus depends on."""

    train: ClipCount = 3000
    """Clips."""
    validation: ClipCount = 300
    test: ClipCount = 600
    seed: Annotated[int, Field(ge=0)] = 0
    shares: TaskSharesConfig = TaskSharesConfig()


@dataclass(frozen=True, kw_only=True)
class SyntheticClip:
    """One clip before it is rendered: its question and its sounds in order."""

    example: Example
    events: tuple[Event, ...]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a corpus of synthetic sounds is made: `write_recipe(recipe(SyntheticCorpusConfig()), Path("data/mine"))`."""

    config: Any
    """Dataclass of everything that it depends on."""
    sizes: Mapping[str, int]
    """Clips of each manifest; those after the three splits repeat clips of the test split."""
    plan: Callable[[str], Sequence[SyntheticClip]]
    """The clips of a manifest, by its name."""
    fields: Callable[[SyntheticClip, np.random.Generator], dict[str, Any]]
    """Fields of a clip in the manifest besides its question and sounds."""
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    modules: tuple[str, ...]
    """Files beside this one whose code it depends on."""


def recipe(config: SyntheticCorpusConfig) -> Recipe:
    """The embedded corpus."""

    def fields(clip: SyntheticClip, rng: np.random.Generator) -> dict[str, Any]:
        reasoning = reasoning_text(clip.events, clip.example, clip.example.answer, rng)
        return {"reasoning": reasoning, "caption": caption_text(clip.events)}

    return Recipe(
        config=config,
        sizes={split: int(asdict(config)[split]) for split in SPLITS},
        plan=partial(plan_split, config),
        fields=fields,
        tokenizer=build_tokenizer,
        modules=("synthetic.py", "synthetic_audio.py", "synthetic_text.py", "tokenizer.py"),
    )


def write_corpus(config: SyntheticCorpusConfig, output: Path, *, progress: bool = True) -> bool:
    """Write the embedded corpus into `output` (`write_recipe`); return False if it was there already."""
    return write_recipe(recipe(config), output, progress=progress)


def write_recipe(made: Recipe, output: Path, *, progress: bool = True) -> bool:
    """Write clips, manifests and tokenizer into `output`; return False if they were there already.

    The layout is `audio/<split>/<id>.flac`, `cuts_<split>.jsonl.gz`, `tokenizer/`. The same parameters give the same
    bytes. The corpus is written beside `output` and then renamed, so no reader sees half of it. A corpus of ours from
    other parameters or another version of this code is replaced. ValueError if `output` holds anything else.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(output.with_name(f".{output.name}.lock")):
        stamp = {"fingerprint": fingerprint(made), "config": asdict(made.config)}
        if _found_fingerprint(output) == stamp["fingerprint"]:
            return False
        unfinished = output.with_name(f".{output.name}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        with tqdm(total=sum(made.sizes.values()), unit="clip", disable=not progress) as bar:
            for name in made.sizes:
                bar.set_description(f"synthesising {name}")
                _write_manifest(made, name, unfinished, bar)
        made.tokenizer().save_pretrained(tokenizer_path(unfinished))
        # Git ignores a corpus inside a repository.
        (unfinished / ".gitignore").write_text("*\n", encoding="utf-8")
        (unfinished / STAMP_NAME).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        if output.exists():
            shutil.rmtree(output)
        unfinished.rename(output)
        return True


def fingerprint(made: Recipe) -> str:
    """Return a hash of the parameters of a corpus and of the code that turns them into clips."""
    digest = hashlib.sha256(json.dumps(asdict(made.config), sort_keys=True).encode())
    for name in made.modules:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


def plan_split(config: SyntheticCorpusConfig, split: str) -> list[SyntheticClip]:
    """Lay out the clips of a split: tasks by their shares, every answer and answer position equally often."""
    size = int(asdict(config)[split])
    clips = [
        plan_clip(config.seed, split, task, number)
        for task, count in _task_counts(size, config.shares).items()
        for number in range(count)
    ]
    order = generator(config.seed, split, "order").permutation(len(clips))
    return [clips[row] for row in order]


def plan_clip(seed: int, split: str, task: str, number: int) -> SyntheticClip:
    """Lay out one clip.

    Answers are dealt in shuffled rounds that hold each possible one once, and so are the places of the right choice:
    over whole rounds both are exactly uniform, so a guess that ignores the audio scores one in four.
    """
    name = f"{split}-{task}-{number:05d}"
    rng = generator(seed, name, "plan")
    subject, answer = _deal(_TARGETS[task], number, seed, split, task, "target")
    position = _deal(range(len(COUNT_WORDS)), number, seed, split, task, "position")
    events = _lay_out(task, subject, answer, rng)
    vocabulary = {"attribute": ATTRIBUTES.get(subject, ()), "count": COUNT_WORDS}.get(task, KINDS)
    choices = [vocabulary[i] for i in rng.permutation(len(vocabulary)) if vocabulary[i] != answer]
    choices.insert(position, answer)
    example = Example(id=name, question=question_text(task, subject), choices=tuple(choices), answer=answer, task=task)
    return SyntheticClip(example=example, events=events)


_TARGETS: dict[str, list[tuple[str, str]]] = {
    "attribute": [(kind, word) for kind, words in ATTRIBUTES.items() for word in words],
    "order": list(product(ORDER_WORDS, KINDS)),
    "loudness": [("", kind) for kind in KINDS],
    "count": [("", word) for word in COUNT_WORDS],
}
"""Every (subject of the question, answer) of a task."""


def _lay_out(task: str, subject: str, answer: str, rng: np.random.Generator) -> tuple[Event, ...]:
    """Draw sounds of distinct kinds for which `answer` is right, with random times, words and loudness."""
    count = COUNT_WORDS.index(answer) + 1 if task == "count" else _EVENTS
    required = {"attribute": subject, "order": answer, "loudness": answer}.get(task)
    others = [kind for kind in rng.permutation(KINDS).tolist() if kind != required]
    kinds = others[:count] if required is None else [required, *others[: count - 1]]
    kinds = [kinds[i] for i in rng.permutation(count)]
    if task == "order":
        kinds.remove(answer)
        kinds.insert(0 if subject == ORDER_WORDS[0] else len(kinds), answer)
    words = [str(rng.choice(ATTRIBUTES[kind])) for kind in kinds]
    if task == "attribute":
        words[kinds.index(subject)] = answer
    loudest = kinds.index(answer) if task == "loudness" else int(rng.integers(count))
    starts, durations = event_times(count, _COUNTED_EVENT_SECONDS if task == "count" else EVENT_SECONDS, rng)
    levels = event_levels(count, loudest, rng)
    return tuple(
        Event(kind=kind, attribute=word, start_seconds=start, duration_seconds=duration, loudness=level)
        for kind, word, start, duration, level in zip(kinds, words, starts, durations, levels, strict=True)
    )


def event_levels(count: int, loudest: int, rng: np.random.Generator) -> list[float]:
    """Draw the loudness of `count` sounds, one of them at least `LOUD_MARGIN_DB` above the others."""
    peak = rng.uniform(*_LOUDEST_DBFS)
    below = np.where(np.arange(count) == loudest, 0.0, rng.uniform(*_BELOW_LOUDEST_DB, count))
    # Rounding both terms keeps the margin: the difference of two rounded levels is exact to the last decimal.
    levels = np.round(peak, _DECIMALS) - np.ceil(below * 10**_DECIMALS) / 10**_DECIMALS
    return [round(float(level), _DECIMALS) for level in levels]


def event_times(count: int, seconds: tuple[float, float], rng: np.random.Generator) -> tuple[list[float], list[float]]:
    """Draw starts and durations of `count` successive sounds; the remaining time is divided at random into gaps."""
    durations = rng.uniform(*seconds, count)
    spare = CLIP_SECONDS - durations.sum() - (count + 1) * _LEAST_GAP_SECONDS
    gaps = _LEAST_GAP_SECONDS + spare * rng.dirichlet(np.ones(count + 1))
    starts = np.cumsum(gaps[:-1]) + np.concatenate([[0.0], np.cumsum(durations[:-1])])
    return [round(float(start), _DECIMALS) for start in starts], [
        round(float(length), _DECIMALS) for length in durations
    ]


def _write_manifest(made: Recipe, split: str, directory: Path, bar: "tqdm[None]") -> None:
    """Write a manifest and those of its clips that no earlier manifest has."""
    seed = int(asdict(made.config)["seed"])
    (directory / "audio").mkdir(parents=True, exist_ok=True)
    # Neither name nor time of writing in the gzip header.
    with (
        manifest_path(directory, split).open("wb") as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as manifest,
    ):
        for clip in made.plan(split):
            name = clip.example.id
            path = Path("audio") / name.split("-")[0] / f"{name}.flac"
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            samples = render_clip(clip.events, generator(seed, name, "audio"))
            if not (directory / path).exists():
                soundfile.write(directory / path, samples, SAMPLE_RATE, subtype="PCM_16")
            cut = _cut(clip, path, len(samples), made.fields(clip, generator(seed, name, "text")))
            manifest.write(json.dumps(cut.to_dict()).encode() + b"\n")
            bar.update()


def _cut(clip: SyntheticClip, path: Path, num_samples: int, fields: dict[str, Any]) -> MonoCut:
    """Describe a clip; `path` is relative to the manifest, as NeMo and `load_cuts` read it."""
    example, seconds = clip.example, num_samples / SAMPLE_RATE
    recording = Recording(
        id=example.id,
        sources=[AudioSource(type="file", channels=[0], source=path.as_posix())],
        sampling_rate=SAMPLE_RATE,
        num_samples=num_samples,
        duration=seconds,
    )
    supervision = SupervisionSegment(
        id=example.id, recording_id=example.id, start=0.0, duration=seconds, text=example.answer
    )
    custom = {
        "question": example.question,
        "choices": list(example.choices),
        "answer": example.answer,
        "task": example.task,
        **fields,
        "events": [asdict(event) for event in clip.events],
    }
    return MonoCut(
        id=example.id,
        start=0.0,
        duration=seconds,
        channel=0,
        recording=recording,
        supervisions=[supervision],
        custom=custom,
    )


def _task_counts(size: int, shares: TaskSharesConfig) -> dict[str, int]:
    """Split `size` clips by the shares; the clips lost to rounding down go to the largest remainders."""
    exact = {task: size * asdict(shares)[task] for task in TASKS}
    counts = {task: int(value) for task, value in exact.items()}
    by_remainder = sorted(TASKS, key=lambda task: exact[task] - counts[task], reverse=True)
    for task in by_remainder[: size - sum(counts.values())]:
        counts[task] += 1
    return counts


def _deal(options: Sequence[Option], number: int, seed: int, *names: str) -> Option:
    """Return entry `number` of an endless sequence in which every round of `len(options)` holds each option once."""
    turn, place = divmod(number, len(options))
    order = generator(seed, *names, str(turn)).permutation(len(options))
    return options[int(order[place])]


def generator(seed: int, *names: str) -> np.random.Generator:
    """Random numbers that depend only on the seed and these names."""
    digest = hashlib.sha256("/".join((str(seed), *names)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _found_fingerprint(output: Path) -> str | None:
    """Return the fingerprint of the corpus in `output`; None if `output` is missing or empty."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    stamp = output / STAMP_NAME
    if not stamp.is_file():
        raise ValueError(
            f"{output} exists and is not a synthetic corpus (it has no {STAMP_NAME}): choose another output directory"
        )
    try:
        return str(json.loads(stamp.read_text(encoding="utf-8"))["fingerprint"])
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{stamp} is damaged ({error}): delete {output} to have the corpus rebuilt") from error
