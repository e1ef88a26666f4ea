"""From an importer's questions to Lhotse manifests, one a split, that the dataloading takes as they are."""

import gzip
import hashlib
import json
import os
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from lhotse import AudioSource, MonoCut, Recording
from tqdm import tqdm

from nemo_mapo.data.entries import DURATION_TOLERANCE_SECONDS
from nemo_mapo.data.importers.audio import AudioStore, StoredAudio
from nemo_mapo.data.importers.base import Drop, Importer, InvalidRecord, Question, Source
from nemo_mapo.data.importers.report import Report, SplitFigures
from nemo_mapo.data.manifests import parse_example
from nemo_mapo.data.splits import SPLITS, manifest_path

REPORT_NAME = "prepare_report.json"


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How a corpus is prepared, whichever it is."""

    sample_rate: int = 16000
    """Hz; what the manifests' audio must have."""
    resample: bool = False
    """Write copies of audio that is not mono at `sample_rate`, instead of refusing it."""
    skip_invalid: bool = False
    """Count lines that are wrong as dropped, instead of stopping at the first."""
    shares: tuple[float, float, float] = (0.9, 0.05, 0.05)
    """Train, validation and test share of the audio of a corpus without splits."""
    split: str | None = None
    """Put everything into this split."""

    def __post_init__(self) -> None:
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-9:
            raise ValueError(f"shares are {self.shares}: give three shares that are not negative and add up to 1")
        if self.sample_rate <= 0:
            raise ValueError(f"sample rate is {self.sample_rate}: give Hz")
        if self.split not in (None, *SPLITS):
            raise ValueError(f"split is {self.split!r}: give one of {', '.join(SPLITS)}")


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """A question that passed every check, with its split."""

    where: str
    split: str
    digest: str
    cut: MonoCut


def prepare(
    importer: Importer, source: Source, output: Path, options: PrepareOptions, *, progress: bool = True
) -> Report:
    """Write `cuts_<split>.jsonl.gz`, `prepare_report.json` and, where audio was copied, `audio/` into `output`.

    `output` appears whole or not at all: it is made beside its place and renamed. The same corpus, seed and options
    give the same manifests.

    Raises:
        ValueError: `output` is there already, the corpus is not laid out as it should be, a line is wrong (unless such
            lines are skipped), audio has another sample rate or several channels, or no question is left.
    """
    output = output.absolute()
    if output.exists():
        raise ValueError(f"{output} exists: choose another output directory, or delete it")
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{output}: cannot write there ({error.strerror})") from error
    try:
        report = Report(importer.name)
        store = AudioStore(partial, sample_rate=options.sample_rate, resample=options.resample)
        desk = _Desk(store, report, options, seed=source.seed)
        for entry in tqdm(importer.read(source), desc=f"reading {importer.name}", unit="line", disable=not progress):
            desk.take(entry)
        placed = _without_shared_audio(desk.placed, report)
        if not placed:
            raise ValueError(f"{source.path}: no question is left\n{report.table()}")
        _write(placed, partial, report)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def seeded_split(digest: str, seed: int, shares: tuple[float, float, float]) -> str:
    """The split of an audio file: a function of its content and the seed, so no file is in two."""
    draw = int.from_bytes(hashlib.sha256(f"{seed}/{digest}".encode()).digest()[:8], "big") / 2**64
    return SPLITS[0] if draw < shares[0] else SPLITS[1] if draw < shares[0] + shares[1] else SPLITS[2]


class _Desk:
    """Takes in lines of a corpus: checks each, keeps it with its split, or counts it as dropped."""

    def __init__(self, store: AudioStore, report: Report, options: PrepareOptions, *, seed: int) -> None:
        self.placed: list[_Placed] = []
        self._store, self._report, self._options, self._seed = store, report, options, seed
        self._places: dict[tuple[str, str], str] = {}

    def take(self, entry: Question | Drop) -> None:
        """ValueError for a line that is wrong, unless such lines are skipped."""
        try:
            made = entry if isinstance(entry, Drop) else self._checked(entry)
        except InvalidRecord as error:
            made = error.drop
        if isinstance(made, _Placed):
            self.placed.append(made)
            return
        if made.is_invalid and not self._options.skip_invalid:
            raise ValueError(f"{made.message}\n(--skip-invalid counts such lines as dropped and goes on)")
        self._report.drop(made.reason, made.message)

    def _checked(self, question: Question) -> _Placed:
        custom = {
            "question": question.question,
            "choices": list(question.choices),
            "answer": question.answer,
            "task": question.task,
            "reasoning": question.reasoning,
            "caption": question.caption,
        }
        try:
            parse_example(question.id, custom, question.where)
        except ValueError as error:
            raise InvalidRecord("question or choices unusable", str(error)) from error
        audio = self._store.add(question.audio, question.where)
        cut = _cut(question, audio, {name: value for name, value in custom.items() if value is not None})
        split = self._options.split or question.split or seeded_split(audio.digest, self._seed, self._options.shares)
        first = self._places.setdefault((split, question.id), question.where)
        if first != question.where:
            raise InvalidRecord(
                "id used twice", f"{question.where}: id {question.id!r} was already used at {first}: make ids unique"
            )
        return _Placed(where=question.where, split=split, digest=audio.digest, cut=cut)


def _cut(question: Question, audio: StoredAudio, custom: dict[str, object]) -> MonoCut:
    start, total = question.start_seconds, audio.duration_seconds
    end = total if question.duration_seconds is None else start + question.duration_seconds
    if not start < min(end, total) or end > total + DURATION_TOLERANCE_SECONDS:
        raise InvalidRecord(
            "stretch not in its audio file",
            f"{question.where}: asks about {start} s to {end} s of a file that lasts {total} s: "
            "correct the times, or replace the file if it is cut short",
        )
    recording = Recording(
        id=audio.digest[:32],
        sources=[AudioSource(type="file", channels=[0], source=audio.source)],
        sampling_rate=audio.sample_rate,
        num_samples=audio.num_samples,
        duration=total,
    )
    return MonoCut(
        id=question.id,
        start=start,
        duration=min(end, total) - start,
        channel=0,
        recording=recording,
        custom=custom,
    )


def _without_shared_audio(placed: list[_Placed], report: Report) -> list[_Placed]:
    """Keep audio that the corpus has in several splits in the last of them only: test whole, training without it."""
    splits: dict[str, dict[str, str]] = defaultdict(dict)
    for one in placed:
        splits[one.digest].setdefault(one.split, one.where)
    report.shared_audio = [places for places in splits.values() if len(places) > 1]
    kept: list[_Placed] = []
    for one in placed:
        home = max(splits[one.digest], key=SPLITS.index)
        if one.split == home:
            kept.append(one)
        else:
            report.drop(f"audio also in {home}", f"{one.where}: the same audio as {splits[one.digest][home]}")
    return kept


def _write(placed: list[_Placed], directory: Path, report: Report) -> None:
    for split in SPLITS:
        rows = [one for one in placed if one.split == split]
        if not rows:
            continue
        report.splits[split] = figures = SplitFigures()
        # Neither name nor time of writing in the gzip header: the same corpus gives the same bytes.
        with (
            manifest_path(directory, split).open("wb") as file,
            gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as manifest,
        ):
            for one in rows:
                cut, custom = one.cut, one.cut.custom or {}
                manifest.write(json.dumps(cut.to_dict(), ensure_ascii=False).encode() + b"\n")
                place = custom["choices"].index(custom["answer"])
                figures.add(digest=one.digest, start=cut.start, duration=cut.duration, task=custom["task"], place=place)
    (directory / REPORT_NAME).write_text(
        json.dumps(report.as_plain(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
