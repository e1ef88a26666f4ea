"""Grounding analysis of a finished run, with the model and the questions of its config."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nemo_mapo.config.analysis import AnalysisConfig
from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.config.run import RunConfig
from nemo_mapo.data.dataset import PromptDataset, build_dataloader, question_ids
from nemo_mapo.data.manifests import completions_by_choice, validate_manifest
from nemo_mapo.data.tokenizer import load_tokenizer
from nemo_mapo.evaluation.grounding.analyse import Subject, analyse
from nemo_mapo.files import write_text
from nemo_mapo.models.layout import MicroBatching
from nemo_mapo.pos_gate.tagger import build_tagger
from nemo_mapo.reports.analyses import Analysis, comparable, read_analysis
from nemo_mapo.reports.clips import write_clips
from nemo_mapo.reports.grounding_page import write_grounding_page
from nemo_mapo.rewards.templates import prompt_wording
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rows import Problem
from nemo_mapo.training.checkpoint import load_checkpoint
from nemo_mapo.training.finished_run import find_checkpoint, read_run_config, unsharded
from nemo_mapo.training.policies import WarmStarter, build_policy, freeze_start, load_start_weights
from nemo_mapo.training.run_directory import commit, this_command

START = "start"
"""Name that stands for the policy before training, instead of a checkpoint's."""


def analyse_run(
    run_dir: Path,
    checkpoint: str | None,
    *,
    split: str,
    config: AnalysisConfig,
    warm_starter: WarmStarter,
    cuts: Path | None = None,
) -> Path:
    """Analyse a checkpoint of a run directory in this process; return the page, written beside the analysis file.

    Args:
        run_dir: with config.yaml and checkpoints/; paths in its config are relative to the working directory.
        checkpoint: name below checkpoints/, or "start"; None is the newest.
        split: "validation" or "test".
        config: what to measure.
        warm_starter: trains the start of a run that has a warm start.
        cuts: a Lhotse manifest of questions to ask instead of those of the split.

    Raises:
        ValueError: no run, no such checkpoint or split, attention other than torch's, a start that cannot be
            reproduced, invalid data.
    """
    opened = open_run(run_dir, checkpoint, split=split, config=config, warm_starter=warm_starter, cuts=cuts)
    name, dataset = opened.checkpoint, opened.dataset
    split = split if cuts is None else cuts.name.split(".")[0]
    results, clips = analyse(opened.subject, opened.batches, config)
    results["items_in_split"] = opened.items_in_split
    for question, waveforms in clips.items():
        write_clips(run_dir, question, waveforms, dataset.sample_rate)
    made = {"commit": commit(), "command": this_command()}
    results = {"run": str(run_dir), "checkpoint": name, "split": split, **made, **results}
    written = write_text(run_dir / "analysis" / f"{name}-{split}.json", json.dumps(results))
    title = f"Grounding of {run_dir.name}, {name}, {split}"
    analyses = [*_start(written, split), read_analysis(written, name)]
    return write_grounding_page(analyses, written.with_suffix(".html"), title=title)


@dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """A checkpoint of a run and the questions to ask it."""

    checkpoint: str
    """Name of the checkpoint."""
    subject: Subject
    batches: Iterable[list[Problem]]
    dataset: DatasetConfig
    items_in_split: int


def open_run(
    run_dir: Path,
    checkpoint: str | None,
    *,
    split: str,
    config: AnalysisConfig,
    warm_starter: WarmStarter,
    cuts: Path | None = None,
) -> OpenedRun:
    """Load a checkpoint and its questions; arguments and errors as in `analyse_run`."""
    run = _in_one_process(read_run_config(run_dir), run_dir)
    name, path = _find_checkpoint(run_dir, checkpoint)
    dataset = _questions(run, run_dir, split, cuts, config)
    validate_manifest(dataset)
    if run.trainer.num_threads is not None:
        torch.set_num_threads(run.trainer.num_threads)
    subject = replace(_subject(run, path, warm_starter), completions=completions_by_choice(dataset))
    prompts = PromptDataset(subject.tokenizer, subject.policy.num_audio_tokens, subject.wording)
    ids = question_ids(dataset, prompts)
    return OpenedRun(
        checkpoint=name,
        subject=subject,
        batches=build_dataloader(dataset, prompt_dataset=prompts, only=frozenset(_choose(ids, config))),
        dataset=dataset,
        items_in_split=len(ids),
    )


def _start(written: Path, split: str) -> list[Analysis]:
    """The analysis of the start on the same questions, if there is one."""
    path = written.with_name(f"{START}-{split}.json")
    if path == written or not path.is_file():
        return []
    start = read_analysis(path, START)
    return [start] if comparable(start, read_analysis(written, written.stem)) else []


def _in_one_process(run: RunConfig, run_dir: Path) -> RunConfig:
    """The run's config for a single process: a checkpoint of any layout can be loaded into an unsharded model."""
    if run.model.attention_backend != "sdpa":
        raise ValueError(
            f"{run_dir} was trained with model.attention_backend={run.model.attention_backend}, whose kernels do not "
            "return their weights; the analysis supports runs with sdpa only"
        )
    model = unsharded(run.model)
    from_noise = run.warm_start is None and run.pretrained_checkpoint.restore_from_path is None
    if from_noise and model != run.model:
        raise ValueError(
            f"{run_dir} started from weights drawn on several ranks, which a single process draws differently: "
            "its start, and with it delta h, cannot be reproduced; analyse runs with a warm start or a "
            "pretrained_checkpoint.restore_from_path"
        )
    return replace(run, model=model, trainer=replace(run.trainer, num_nodes=1, devices=1))


def _questions(run: RunConfig, run_dir: Path, split: str, cuts: Path | None, config: AnalysisConfig) -> DatasetConfig:
    """The split's settings, with `cuts` in place of its manifest if given."""
    dataset = {"validation": run.data.validation_ds, "test": run.data.test_ds}[split]
    if cuts is not None:
        dataset = replace(
            dataset or run.data.validation_ds,
            input_cfg=({"type": "lhotse", "cuts_path": str(cuts)},),
            max_samples=None,
        )
    if dataset is None:
        raise ValueError(f"{run_dir} has no {split} split (data.{split}_ds is null): name another --split, or --cuts")
    return replace(dataset, batch_size=config.batch_size or dataset.batch_size)


def _choose(ids: Sequence[str], config: AnalysisConfig) -> Sequence[str]:
    """All questions, or the requested number drawn at random: the first ones of a split are often of the same kind."""
    if config.max_items is None or config.max_items >= len(ids):
        return ids
    return random.Random(config.seed).sample(ids, config.max_items)


def _find_checkpoint(run_dir: Path, name: str | None) -> tuple[str, Path | None]:
    if name == START:
        return name, None
    # Before the model is built, so that a mistyped name does not cost minutes.
    path = find_checkpoint(run_dir, name)
    return path.name, path


def _subject(run: RunConfig, checkpoint: Path | None, warm_starter: WarmStarter) -> Subject:
    tokenizer = load_tokenizer(run.data.tokenizer)
    policy = build_policy(run, tokenizer)
    load_start_weights(policy, run, tokenizer, warm_starter)
    reference = freeze_start(policy, run, tokenizer, batching=MicroBatching(rows=run.model.micro_batch_size))
    if checkpoint is not None:
        load_checkpoint(checkpoint, policy)
    return Subject(
        policy=policy,
        backend=MegatronRollout(policy, tokenizer, batch_size=run.rollout.batch_size),
        reference=reference,
        tokenizer=tokenizer,
        tagger=build_tagger(),
        rewards=run.rewards,
        sampling=run.rollout.sampling,
        wording=prompt_wording(run.data.prompt, run.rewards.template),
    )
