"""Writes an importer's questions as Lhotse manifests, one per split, ready for dataloading."""

import gzip
import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lhotse import AudioSource, MonoCut, Recording
from tqdm import tqdm

from nemo_mapo.data.entries import DURATION_TOLERANCE_SECONDS
from nemo_mapo.data.importers.audio import AudioStore, StoredAudio
from nemo_mapo.data.importers.base import Drop, Importer, InvalidRecord, Question, Source
from nemo_mapo.data.importers.grouping import Member, assign_splits, leaks
from nemo_mapo.data.importers.report import Report, SplitStatistics
from nemo_mapo.data.importers.tokenizer_training import own_tokenizer
from nemo_mapo.data.manifests import parse_example
from nemo_mapo.data.splits import SPLITS, manifest_path, tokenizer_path
from nemo_mapo.files import whole_directory

REPORT_NAME = "prepare_report.json"


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Options of preparation, the same for every corpus."""

    sample_rate: int = 16000
    """Hz; what the manifests' audio must have."""
    resample: bool = False
    """Write copies of audio that is not mono at `sample_rate`, instead of refusing it."""
    skip_invalid: bool = False
    """Count invalid lines as dropped, instead of stopping at the first."""
    shares: tuple[float, float, float] = (0.9, 0.05, 0.05)
    """Train, validation and test share of the questions of a corpus without splits."""
    split: str | None = None
    """Put everything into this split."""
    tokenizer: str | None = None
    """`train` trains one on the text of the training split; else a tokenizer's directory. Goes into `tokenizer/`."""
    vocabulary: int = 4096
    """At most this many entries of a trained tokenizer, including bytes, control tokens and tags."""

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
    """Empty until splits are assigned, for a question whose corpus names none."""
    group: str
    """Questions of a group go to the same split."""
    digests: tuple[str, ...]
    """Of its clips."""
    cut: MonoCut
    labels: Mapping[str, str]


def prepare(
    importer: Importer, source: Source, output: Path, options: PrepareOptions, *, progress: bool = True
) -> Report:
    """Write `cuts_<split>.jsonl.gz`, `prepare_report.json` and, if audio was copied, `audio/` into `output`.

    `output` appears complete or not at all: it is written beside its final path and renamed. The same corpus, seed and
    options give the same manifests. Lines are in random order, so the first ones (`max_samples`) are a random sample.

    Raises:
        ValueError: `output` already exists, the corpus is not laid out as it should be, a line is wrong (unless such
            lines are skipped), audio has another sample rate or several channels, or no question is left.
    """
    with whole_directory(output.absolute()) as partial:
        report = Report(importer.name)
        store = AudioStore(partial, sample_rate=options.sample_rate, resample=options.resample)
        desk = _Desk(store, report, options, group_by=source.group_by)
        for entry in tqdm(importer.read(source), desc=f"reading {importer.name}", unit="line", disable=not progress):
            desk.take(entry)
        report.turned_down = store.turned_down
        placed = _without_shared_audio(_with_splits(desk.placed, options.shares, seed=source.seed), report)
        if not placed:
            raise ValueError(f"{source.path}: no question is left\n{report.table()}")
        placed.sort(key=lambda one: hashlib.sha256(f"{source.seed}/{one.cut.id}".encode()).digest())
        report.leaks = leaks((one.split, one.labels) for one in placed)
        _write(placed, partial, report)
        if options.tokenizer is not None:
            made = own_tokenizer(options.tokenizer, _texts(placed), vocabulary=options.vocabulary)
            made.save_pretrained(str(tokenizer_path(partial)))
    return report


def _with_splits(placed: Sequence[_Placed], shares: tuple[float, float, float], *, seed: int) -> list[_Placed]:
    """Every question with a split: the corpus's own, else by shares, whole groups, stratified by answer."""
    members = [Member(group=one.group, answer=one.cut.custom["answer"]) for one in placed if not one.split]
    found = assign_splits(members, shares, seed=seed)
    return [one if one.split else replace(one, split=found[one.group]) for one in placed]


def _texts(placed: Sequence[_Placed]) -> list[str]:
    """The texts of the training split, to train a tokenizer."""
    fields = [one.cut.custom or {} for one in placed if one.split == SPLITS[0]]
    texts = [
        [f" {of['question']} choices: {', '.join(of['choices'])}.", *(f" {choice}" for choice in of["choices"])]
        + [f" {of[name]}" for name in ("reasoning", "caption") if of.get(name)]
        for of in fields
    ]
    return [text for of_question in texts for text in of_question]


class _Desk:
    """Collects lines of a corpus: checks each, keeps it with its split, or counts it as dropped."""

    def __init__(self, store: AudioStore, report: Report, options: PrepareOptions, *, group_by: str | None) -> None:
        self.placed: list[_Placed] = []
        self._store, self._report, self._options, self._group_by = store, report, options, group_by
        self._places: dict[tuple[str, str], str] = {}

    def take(self, entry: Question | Drop) -> None:
        """ValueError for an invalid line, unless such lines are skipped."""
        try:
            made = entry if isinstance(entry, Drop) else self._checked(entry)
        except InvalidRecord as error:
            made = error.drop
        if isinstance(made, _Placed):
            self.placed.append(made)
            return
        if made.is_invalid and not self._options.skip_invalid:
            raise ValueError(f"{made.message}\n(with --skip-invalid such lines are counted as dropped)")
        self._report.drop(made.reason, made.message)

    def _checked(self, question: Question) -> _Placed:
        custom = {
            **question.labels,
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
        audio, *further = [self._store.add(one, question.where) for one in (question.audio, *question.further_audio)]
        clips = {f"audio_{number}": _recording(one) for number, one in enumerate(further, start=2)}
        fields = {name: value for name, value in custom.items() if value is not None}
        cut = _cut(question, audio, {**fields, **clips})
        split = self._options.split or question.split or ""
        first = self._places.setdefault((split, question.id), question.where)
        if first != question.where:
            raise InvalidRecord(
                "id used twice", f"{question.where}: id {question.id!r} was already used at {first}: make ids unique"
            )
        group = audio.digest if self._group_by is None else self._group(question, self._group_by)
        return _Placed(
            where=question.where,
            split=split,
            group=group,
            digests=(audio.digest, *(one.digest for one in further)),
            cut=cut,
            labels=question.labels,
        )

    @staticmethod
    def _group(question: Question, group_by: str) -> str:
        if group_by not in question.labels:
            raise InvalidRecord(
                "no group", f"{question.where}: field {group_by!r}, which --group-by names, is missing or empty: add it"
            )
        return question.labels[group_by]


def _cut(question: Question, audio: StoredAudio, custom: dict[str, object]) -> MonoCut:
    start, total = question.start_seconds, audio.duration_seconds
    end = total if question.duration_seconds is None else start + question.duration_seconds
    if not start < min(end, total) or end > total + DURATION_TOLERANCE_SECONDS:
        raise InvalidRecord(
            "stretch not in its audio file",
            f"{question.where}: asks about {start} s to {end} s of a file that lasts {total} s: "
            "correct the times, or replace the file if it is truncated",
        )
    return MonoCut(
        id=question.id,
        start=start,
        duration=min(end, total) - start,
        channel=0,
        recording=_recording(audio),
        custom=custom,
    )


def _recording(audio: StoredAudio) -> Recording:
    return Recording(
        id=audio.digest[:32],
        sources=[AudioSource(type="file", channels=[0], source=audio.source)],
        sampling_rate=audio.sample_rate,
        num_samples=audio.num_samples,
        duration=audio.duration_seconds,
    )


def _without_shared_audio(placed: list[_Placed], report: Report) -> list[_Placed]:
    """Keep audio that the corpus has in several splits in the last of them only: test whole, training without it."""
    splits: dict[str, dict[str, str]] = defaultdict(dict)
    for one in placed:
        for digest in one.digests:
            splits[digest].setdefault(one.split, one.where)
    report.shared_audio = [places for places in splits.values() if len(places) > 1]
    kept: list[_Placed] = []
    for one in placed:
        digest = max(one.digests, key=lambda digest: max(map(SPLITS.index, splits[digest])))
        home = max(splits[digest], key=SPLITS.index)
        if one.split == home:
            kept.append(one)
        else:
            report.drop(f"audio also in {home}", f"{one.where}: the same audio as {splits[digest][home]}")
    return kept


def _write(placed: list[_Placed], directory: Path, report: Report) -> None:
    for split in SPLITS:
        rows = [one for one in placed if one.split == split]
        if not rows:
            continue
        report.splits[split] = statistics = SplitStatistics()
        # Neither name nor time of writing in the gzip header: the same corpus gives the same bytes.
        with (
            manifest_path(directory, split).open("wb") as file,
            gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as manifest,
        ):
            for one in rows:
                cut, custom = one.cut, one.cut.custom or {}
                manifest.write(json.dumps(cut.to_dict(), ensure_ascii=False).encode() + b"\n")
                place = custom["choices"].index(custom["answer"])
                statistics.add(
                    digest=one.digests[0], start=cut.start, duration=cut.duration, task=custom["task"],
                    answer=custom["answer"], place=place,
                )  # fmt: skip
    (directory / REPORT_NAME).write_text(
        json.dumps(report.as_plain(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
