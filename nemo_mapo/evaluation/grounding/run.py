"""Analyses a finished run: its config says what the model is and where the questions are."""

import json
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from nemo_mapo.config.analysis import AnalysisConfig
from nemo_mapo.config.load import validate
from nemo_mapo.config.run import RunConfig
from nemo_mapo.data.dataset import PromptDataset, build_dataloader
from nemo_mapo.data.manifests import validate_manifest
from nemo_mapo.data.tokenizer import load_tokenizer
from nemo_mapo.evaluation.grounding.analyse import Subject, analyse
from nemo_mapo.grounding.tagger import build_tagger
from nemo_mapo.reports.grounding_page import read_analysis, write_grounding_page
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.training.checkpoint import CheckpointStore, load_checkpoint
from nemo_mapo.training.policies import build_policy, freeze_start, load_start_weights
from nemo_mapo.training.run_directory import RunDirectory
from nemo_mapo.training.signals import MicroBatching

START = "start"
"""In place of a checkpoint: the policy before training."""


def analyse_run(run_dir: Path, checkpoint: str | None, *, split: str, config: AnalysisConfig) -> Path:
    """Analyse a checkpoint of a run directory in this process; return the page, beside which lies the analysis.

    Args:
        run_dir: with config.yaml and checkpoints/; paths in its config are relative to the working directory.
        checkpoint: name below checkpoints/, or "start"; None is the newest.
        split: "validation" or "test".
        config: what to measure.

    Raises:
        ValueError: no run, no such checkpoint or split, a layout of several ranks, unsound data.
    """
    run = _read_config(run_dir)
    name, path = _find_checkpoint(run_dir, checkpoint)
    dataset = {"validation": run.data.validation_ds, "test": run.data.test_ds}[split]
    if dataset is None:
        raise ValueError(f"{run_dir} has no {split} split (data.{split}_ds is null)")
    if config.max_items is not None:
        dataset = replace(dataset, max_samples=config.max_items)
    validate_manifest(dataset)
    if run.trainer.num_threads is not None:
        torch.set_num_threads(run.trainer.num_threads)
    subject = _subject(run, path)
    prompts = PromptDataset(subject.tokenizer, subject.policy.num_audio_tokens)
    results = analyse(subject, build_dataloader(dataset, prompt_dataset=prompts), config)
    written = run_dir / "analysis" / f"{name}-{split}.json"
    written.parent.mkdir(exist_ok=True)
    partial = written.with_suffix(".json.partial")
    partial.write_text(
        json.dumps({"run": str(run_dir), "checkpoint": name, "split": split, **results}), encoding="utf-8"
    )
    partial.replace(written)
    title = f"Grounding of {run_dir.name}, {name}, {split}"
    return write_grounding_page([read_analysis(written, name)], written.with_suffix(".html"), title=title)


def newest_analysis(run_dir: Path) -> Path:
    """The analysis file of a run directory that was written last; ValueError where there is none."""
    found = sorted((run_dir / "analysis").glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"{run_dir} has no analysis; make one: python examples/analyse.py {run_dir}")
    return found[-1]


def _read_config(run_dir: Path) -> RunConfig:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run_dir} is no run directory: it has no config.yaml")
    return validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def _find_checkpoint(run_dir: Path, name: str | None) -> tuple[str, Path | None]:
    directory = RunDirectory(path=run_dir).checkpoints
    if name == START:
        return name, None
    if name is not None:
        return name, directory / name
    newest = CheckpointStore(directory, keep=1).latest()
    if newest is None:
        raise ValueError(f"{run_dir} has no checkpoint; name --checkpoint {START} to analyse what it starts from")
    return newest.path.name, newest.path


def _subject(run: RunConfig, checkpoint: Path | None) -> Subject:
    tokenizer = load_tokenizer(run.data.tokenizer)
    policy = build_policy(run, tokenizer)
    load_start_weights(policy, run, tokenizer)
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
    )
