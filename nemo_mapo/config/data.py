"""The data of a run: splits, mixtures, phases."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from nemo_mapo.config.base import config_class
from nemo_mapo.config.fields import (
    Count,
    CountOrZero,
    Flag,
    Fraction,
    Name,
    OrderSeed,
    PathText,
    Seconds,
    SecondsOrZero,
)
from nemo_mapo.config.input_cfg import InputCfg, Item, check_items, sources_of

TARGET_FIELDS = frozenset({"question", "caption", "answer"})
"""Fields that the templates of `TargetConfig` may use in braces."""


@config_class
class PhaseConfig:
    """One phase of a curriculum."""

    name: Name
    """Name in the log."""
    input_cfg: Annotated[InputCfg, Field(min_length=1)]
    """What this phase draws from, as in `input_cfg` of the split."""
    steps: Count
    """Rollout batches drawn in this phase."""


class Phase(NamedTuple):
    """A phase as the dataloading sees it: a split of its own."""

    name: str
    steps: int | None
    """Rollout batches; None means until the end of the run."""
    split: "DatasetConfig"


@config_class
class DatasetConfig:
    """One split, read through NeMo's Lhotse dataloading."""

    input_cfg: InputCfg = ()
    """As in NeMo: a list of items {type: lhotse, cuts_path: ...} | nemo | nemo_tarred | lhotse_shar |
    multimodal_conversation | group, or the path of a YAML file with such a list (docs/data.md). An item with a larger
    `weight` is drawn more often (see `infinite`); inside a `group` it counts among the items of the group."""
    manifest_filepath: PathText | None = None
    """Short for one item of type nemo, or nemo_tarred with `tarred_audio_filepaths`, instead of `input_cfg`."""
    tarred_audio_filepaths: PathText | None = None
    """The archives of `manifest_filepath`, e.g. audio__OP_0..511_CL_.tar."""
    cuts_path: PathText | None = None
    """Short for one item of type lhotse."""
    shar_path: PathText | None = None
    """Short for one item of type lhotse_shar."""
    phases: tuple[PhaseConfig, ...] = ()
    """A curriculum instead of `input_cfg`: one phase after the other, each for its number of steps."""
    infinite: Flag = False
    """Draw forever, from each item of `input_cfg` in proportion to its weight; needs the loop's max_steps. false: an
    epoch is one pass over all items (weights decide how early an item is drawn), and epochs follow each other."""
    bucket_duration_bins: Annotated[tuple[Seconds, ...], Field(min_length=1)] | None = None
    """Boundaries of duration buckets, seconds, ascending: a batch holds clips of one bucket, so there is little
    padding. Its size stays `batch_size`; a budget in tokens is `model.packed_tokens`."""
    batch_size: Count = 8
    """Prompts per rollout batch."""
    sample_rate: Count = 16000
    """Hz; clips with another rate are refused."""
    shuffle: Flag = False
    """Draw in a different order every epoch."""
    shuffle_buffer_size: Count = 10000
    """Cuts in the buffer that `shuffle` draws from, named as in NeMo: every rank holds this many, with their audio if
    it comes from archives (`nemo_tarred`, `lhotse_shar`). A smaller buffer needs less memory and mixes less."""
    bucket_buffer_size: Count = 10000
    """Cuts in the buffer in which duration buckets fill up, likewise."""
    seed: OrderSeed = 0
    """Seed of the order."""
    min_duration: SecondsOrZero = 0.1
    """Seconds; shorter clips are left out."""
    max_duration: Seconds = 30.0
    """Seconds; longer clips are left out."""
    max_samples: Count | None = None
    """Use only this many cuts, from the first."""
    check_cuts: Count | None = None
    """At start-up, check only this many cuts of every item of `input_cfg`, if checking all takes too long; a faulty
    cut beyond them ends the run when it is drawn."""
    max_unreadable: CountOrZero = 0
    """Unreadable clips that a run tolerates: each is replaced by another clip of its batch, logged and counted. One
    more ends the run."""

    def __post_init__(self) -> None:
        self._check_one_origin()
        check_items(self.items)
        for number, phase in enumerate(self.phases):
            check_items(phase.input_cfg, f"phases[{number}].input_cfg")
        if self.min_duration > self.max_duration:
            raise ValueError(
                f"min_duration={self.min_duration} is above max_duration={self.max_duration}: no clip fits both"
            )
        bins = self.bucket_duration_bins
        if bins is not None and (list(bins) != sorted(set(bins)) or bins[0] <= 0):
            raise ValueError(f"bucket_duration_bins={list(bins)}: give seconds above 0 in ascending order")
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ValueError(f"phases: names {names} are not distinct")

    def _check_one_origin(self) -> None:
        """ValueError unless exactly one key says what to draw from."""
        if self.tarred_audio_filepaths is not None and self.manifest_filepath is None:
            raise ValueError("tarred_audio_filepaths needs manifest_filepath, the manifests of these archives")
        keys = ("input_cfg", "phases", "manifest_filepath", "cuts_path", "shar_path")
        given = [name for name in keys if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                "give either input_cfg (what to draw from), or phases (a curriculum), or one manifest as "
                f"manifest_filepath, cuts_path or shar_path, and only one of these; given: {', '.join(given) or 'none'}"
            )

    @property
    def items(self) -> tuple[Item, ...]:
        """What to draw from without phases: `input_cfg`, or the one item that a short form stands for."""
        shorts = (
            ("nemo", "manifest_filepath", self.manifest_filepath),
            ("lhotse", "cuts_path", self.cuts_path),
            ("lhotse_shar", "shar_path", self.shar_path),
        )
        for kind, key, path in shorts:
            if path is not None and self.tarred_audio_filepaths is not None:
                archives = {"tarred_audio_filepaths": self.tarred_audio_filepaths}
                return ({"type": "nemo_tarred", key: path, **archives},)
            if path is not None:
                return ({"type": kind, key: path},)
        return self.input_cfg

    @property
    def num_sources(self) -> int:
        """Number of items in `items` and its groups, not counting groups."""
        return len(list(sources_of(self.items)))

    def in_phases(self) -> Iterator[Phase]:
        """The phases in order, each as a split of its own; a split without a curriculum is one phase."""
        if not self.phases:
            yield Phase("all", None, self)
        for phase in self.phases:
            yield Phase(phase.name, phase.steps, replace(self, phases=(), input_cfg=phase.input_cfg))


@config_class
class PromptConfig:
    """Text of every prompt besides its question, in training, validation, test and analysis alike."""

    system: Annotated[str, Field(min_length=1)] | None = None
    """System message; needs a tokenizer with a chat template. null leaves it to that template."""
    instruction: Annotated[str, Field(min_length=1)] | None = "template"
    """Follows the question and its choices. `template` asks for the format of the rewarded reasoning template
    (docs/data.md has the texts); null adds nothing, which suits a start policy that has learned the format."""


@config_class
class TargetConfig:
    """What supervised training teaches the model to say about a clip (docs/own_data.md); MAPO does not use it."""

    form: Literal["template", "plain", "verbatim"] = "template"
    """`template`: reasoning and answer in the tags of `rewards.template`; `plain`: the answer alone, for any question
    with an answer; `verbatim`: the manifest's `reasoning` as it is, including tags and answer."""
    from_caption: Annotated[str, Field(min_length=1)] = "{caption} So the answer is {answer}."
    """Reasoning for a cut without `reasoning` that has a `caption`; {question}, {caption}, {answer} are filled in."""
    from_answer: Annotated[str, Field(min_length=1)] | None = "The answer seems to be {answer}."
    """Reasoning for a cut that has neither; null refuses such cuts."""
    text_only_share: Fraction = 0.0
    """Share of each batch whose clip is dropped, so that the text-only reference of MAPO stays in distribution."""
    silent_clip_share: Fraction = 0.0
    """Share of each batch whose clip is silence, so that the model learns to guess among the choices on silence."""

    def __post_init__(self) -> None:
        if (total := self.text_only_share + self.silent_clip_share) > 1:
            raise ValueError(f"text_only_share + silent_clip_share = {total:g} exceeds 1, all samples")
        for name, given, allowed in (
            ("from_caption", self.from_caption, TARGET_FIELDS),
            ("from_answer", self.from_answer or "", TARGET_FIELDS - {"caption"}),
        ):
            if unknown := sorted(set(re.findall(r"\{(.*?)\}", given)) - allowed):
                raise ValueError(f"{name}={given!r}: {unknown} is none of {{{'}, {'.join(sorted(allowed))}}}")


@config_class
class DataConfig:
    """Splits and how questions become prompts."""

    train_ds: DatasetConfig
    validation_ds: DatasetConfig
    test_ds: DatasetConfig | None = None
    corpus_dir: PathText | None = None
    """Directory that the paths of this section refer to by interpolation; used for nothing else."""
    prepared_dir: PathText | None = None
    """Another such directory: what examples/prepare_data.py wrote."""
    phase_steps: tuple[Count, ...] | None = None
    """Lengths that `train_ds.phases` refer to by interpolation; used for nothing else."""
    tokenizer: PathText
    """Directory of a Hugging Face tokenizer."""
    prompt: PromptConfig = PromptConfig()
    target: TargetConfig = TargetConfig()

    def __post_init__(self) -> None:
        for name, split in self.splits.items():
            if name != "train_ds":
                _check_scored(name, split)
        rates = {name: split.sample_rate for name, split in self.splits.items()}
        if len(set(rates.values())) > 1:
            raise ValueError(f"sample_rate differs between splits ({rates}); the model reads one rate")

    @property
    def splits(self) -> dict[str, DatasetConfig]:
        """The configured splits, by key."""
        named = {"train_ds": self.train_ds, "validation_ds": self.validation_ds, "test_ds": self.test_ds}
        return {name: split for name, split in named.items() if split is not None}


def _check_scored(name: str, split: DatasetConfig) -> None:
    """ValueError if a scored split would not be read completely, once and in order."""
    for field, plain in (("phases", ()), ("infinite", False), ("bucket_duration_bins", None), ("max_unreadable", 0)):
        if getattr(split, field) != plain:
            raise ValueError(
                f"{name}.{field}={getattr(split, field)!r} is for training; every clip of {name} is scored, once: "
                f"leave it at {plain!r}"
            )
