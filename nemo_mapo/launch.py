"""Assembles a run from its config and executes it: start weights, training, test, report."""

import logging
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from nemo.utils.exp_manager import exp_manager

from nemo_mapo.aligner import CustomLoggerWrapper, Timer
from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.config.run import RunConfig
from nemo_mapo.config.start import check_start
from nemo_mapo.data.dataset import PromptDataset, PromptLoader, build_dataloader, longest_prompt
from nemo_mapo.data.manifests import validate_manifest
from nemo_mapo.data.tokenizer import SpecialTokens, load_tokenizer
from nemo_mapo.embedded.warm_start import start_embedded
from nemo_mapo.evaluation.evaluate import Evaluation, Evaluator, test_records, test_summary, waveforms
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import MicroBatching
from nemo_mapo.platform import initialize_parallel, install_cpu_host, on_cpu_host
from nemo_mapo.pos_gate.tagger import build_tagger
from nemo_mapo.processes import is_main_rank, lead_processes
from nemo_mapo.ranks import data_parallel_prompts
from nemo_mapo.reports.clips import write_clips
from nemo_mapo.reports.report import write_report
from nemo_mapo.rewards.combined import build_rewards
from nemo_mapo.rewards.templates import prompt_wording
from nemo_mapo.rollout.checks import refuse_long
from nemo_mapo.rollout.factory import build_backend
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rollout.protocol import RolloutBackend
from nemo_mapo.rows import Prompt
from nemo_mapo.training.actor import MapoActor
from nemo_mapo.training.checkpoint import CheckpointStore
from nemo_mapo.training.early_signs import warn_below_chance
from nemo_mapo.training.loop import TrainingLoop
from nemo_mapo.training.optimizer import build_optimizer, wrap_data_parallel
from nemo_mapo.training.policies import build_policy, freeze_start, load_start_weights
from nemo_mapo.training.prompts import PromptPhase, PromptStream
from nemo_mapo.training.records import JsonLinesLogger, LivePage
from nemo_mapo.training.references import FrozenReference
from nemo_mapo.training.room import no_room_in
from nemo_mapo.training.run_directory import RunDirectory, commit, open_run_directory, this_command
from nemo_mapo.training.samples import SampleWriter
from nemo_mapo.training.scoring import RolloutScorer
from nemo_mapo.training.start_check import check_prefill, check_start_fits
from nemo_mapo.training.trainer import MapoTrainer

logger = logging.getLogger(__name__)

PROJECT = "nemo-mapo"
"""Weights & Biases project, unless the config names one."""
ENDED_EARLY = "ended before its last step; continue with exp_manager.resume_if_exists=true"


def run(config: RunConfig, assembly: "type[Assembly] | None" = None) -> Path:
    """Train as `config` says, evaluate on the test split, write the report; return the run directory.

    `assembly` builds the parts of the run; None is a MAPO run.

    Raises:
        ValueError: something that the user can fix in the config, the data or the run directory.
        RewardsUnavailable, RolloutUnavailable: a server is unreachable; the run has saved and can be resumed.
        NoRoomLeft: the disk is full; the last complete checkpoint is untouched.
    """
    with no_room_in(Path(config.exp_manager.explicit_log_dir)):
        return _run(config, assembly or Assembly)


def _run(config: RunConfig, assembly: "type[Assembly]") -> Path:
    if config.supervised is not assembly.supervised:
        raise ValueError("trainer.sft and examples/sft.py need each other: use both, or examples/train_mapo.py without")
    check_start(config)
    # Imports the user's functions: a wrong path is found before anything is built.
    build_rewards(config.rewards)
    lead_processes()
    _set_up_host(config)
    directory = open_run_directory(config)
    with directory.locked():
        # Quick, and better to fail here than after an hour of checking data.
        SpecialTokens.from_tokenizer(load_tokenizer(config.data.tokenizer))
        _check_data(config)
        check_start_fits(config)
        started = time.time()
        parts = assembly(config, directory)
        events = _resume(parts.trainer, directory, config)
        facts: dict[str, Any] = {
            "title": directory.path.name,
            "started": _clock(started),
            "commit": commit(),
            "command": this_command(),
            **parts.trainer.facts(),
            "events": events,
        }
        directory.write_summary(facts)
        finished = parts.trainer.fit()
        if not finished:
            events.append({"step": parts.trainer.step, "message": ENDED_EARLY})
        facts |= parts.trainer.checkpoints.facts()
        tested = finished and config.data.test_ds is not None
        # Written before the test as well: a clip that cannot be read there must not cost the report.
        _write_up(directory, facts, ended=not tested)
        if finished:
            parts.finish()
        if tested:
            _write_up(directory, facts | {"test": parts.test()}, ended=True)
        if not finished:
            logger.info(ENDED_EARLY)
    return directory.path


def _resume(trainer: TrainingLoop, directory: RunDirectory, config: RunConfig) -> list[dict[str, Any]]:
    """Continue from the newest undamaged checkpoint, if the run resumes and has one; drop all later records.

    Returns events for run.json.
    """
    resumes = config.exp_manager.resume_if_exists
    checkpoint, damaged = trainer.checkpoints.newest_undamaged() if resumes else (None, [])
    if checkpoint is None:
        steps = directory.metrics.last_step()
        if steps > config.trainer.loop.save_interval:
            raise ValueError(
                f"exp_manager.explicit_log_dir={directory.path} has {steps} recorded steps but no checkpoint to "
                "continue from; choose another directory, or delete this one"
            )
        directory.forget_after(-1)
        return []
    for found in damaged:
        logger.warning(f"DAMAGED CHECKPOINT: {found}; resuming from the one before it, {checkpoint.path}")
    trainer.resume(checkpoint)
    directory.forget_after(trainer.step)
    logger.info(f"resuming after step {trainer.step} from {checkpoint.path}")
    return [{"step": trainer.step, "message": f"skipped a damaged checkpoint: {found}"} for found in damaged]


def _check_data(config: RunConfig) -> None:
    """Check every split before anything is built.

    Raises:
        ValueError: naming split, file, line and value; also if a scored split would lose clips, because its accuracy
            would then not be that of the whole split.
    """
    for name, split in splits_of(config):
        try:
            checked = validate_manifest(split, open_ended=config.supervised)
        except ValueError as error:
            raise ValueError(f"data.{name}.{error}") from error
        if split.check_cuts is not None:
            logger.info(f"data.{name}: checked {checked.found} cuts, at most {split.check_cuts} per item")
        left_out = checked.found - checked.admissible
        if left_out and name != "train_ds":
            raise ValueError(
                f"data.{name}: {left_out} of {checked.found} clips lie outside min_duration={split.min_duration} .. "
                f"max_duration={split.max_duration} seconds and would silently not be scored; widen the bounds"
            )
        if left_out:
            logger.info(f"data.{name}: {left_out} of {checked.found} clips are left out because of their duration")


def splits_of(config: RunConfig) -> Iterator[tuple[str, DatasetConfig]]:
    """Every split of the config with its path; each phase of a curriculum counts as a split."""
    for name, split in config.data.splits.items():
        for number, phase in enumerate(split.in_phases()):
            yield f"{name}.phases[{number}]" if split.phases else name, phase.split


def _write_up(directory: RunDirectory, facts: dict[str, Any], *, ended: bool) -> None:
    """Write run.json and the report, on the main rank; the page of a run that has not ended loads itself again."""
    if is_main_rank():
        end = {"finished": _clock(time.time())} if ended else {}
        directory.write_summary(facts | end | _cost(directory))
        write_report(directory.path)


def _cost(directory: RunDirectory) -> dict[str, Any]:
    """Time of the run's steps and validations over all its sessions, and peak memory of this session."""
    timed = ("timing/step_seconds", "timing/validation_seconds")
    seconds = sum(record.get(name, 0.0) for record in directory.metrics.read() for name in timed)
    return {"seconds_total": seconds, "peak_rss_gb": peak_rss_gb()}


class Assembly:
    """Every part of a run, built once and in order."""

    supervised: ClassVar[bool] = False
    """Whether it trains on targets (`launch_sft`) instead of rollouts."""
    trainer: TrainingLoop

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        self.config = config
        self.directory = directory
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.special = SpecialTokens.from_tokenizer(self.tokenizer)
        self.wording = prompt_wording(config.data.prompt, config.rewards.template)
        if not self.supervised or config.data.target.form == "template":
            check_prefill(self.tokenizer, self.wording, config.rewards.template)
        self.batching = MicroBatching.of(config.model)
        self.policy = build_policy(config, self.tokenizer)
        self._check_positions()
        self.rollout = self._rollout_engine()
        load_start_weights(self.policy, config, self.tokenizer, start_embedded)
        self.reference = self._reference()
        self.validator = self._evaluator(config.data.validation_ds)
        self.trainer = self._build_trainer()

    def test(self) -> dict[str, float]:
        """Evaluate the start and the final policy on the test split, which nothing else reads."""
        assert self.config.data.test_ds is not None
        evaluator = self._evaluator(self.config.data.test_ds, detailed=True)
        step = self.trainer.step
        with self.reference.start_policy() as start:
            before = evaluator(start, self._backend(start), step=0, split="test")
        after = evaluator(self.policy, self._backend(self.policy), step=step, split="test")
        self.directory.profiles.append([before.profile.record(0, "before"), after.profile.record(step, "after")])
        self.directory.test.append(test_records(step, before, after))
        return test_summary(before, after)

    def validate(self, step: int) -> dict[str, float]:
        """Evaluate the policy on the validation split."""
        evaluation = self._answer_validation(step)
        right = round(evaluation.accuracy * evaluation.samples)
        warn_below_chance(right, evaluation.samples, chance=evaluation.chance, step=step)
        return evaluation.metrics()

    def _answer_validation(self, step: int) -> Evaluation:
        """Greedy decoding of the validation split; what a report shows of it goes into the run directory."""
        evaluation = self.validator(self.policy, self._backend(self.policy), step=step, split="validation")
        self.directory.rollouts.append(evaluation.records)
        if is_main_rank():
            for question, clips in evaluation.clips.items():
                write_clips(self.directory.path, question, clips, self.config.data.train_ds.sample_rate)
        return evaluation

    def _keep_clip(self, step: int, prompt: Prompt) -> None:
        """Keep the clips of the sampled question, at the first step and at steps that end in a validation."""
        every = self.config.trainer.mapo.val_check_interval
        if step == 1 or (every > 0 and step % every == 0):
            rate = self.config.data.train_ds.sample_rate
            write_clips(self.directory.path, prompt.id, waveforms(prompt), rate)

    def finish(self) -> None:
        """Called after the last step, before the test."""

    @staticmethod
    def finite(split: DatasetConfig) -> DatasetConfig:
        """The split, to be read in one pass."""
        return replace(split, infinite=False)

    def _check_positions(self) -> None:
        """ValueError naming the clip whose prompt leaves no room for a completion."""
        sampling, positions = self.config.rollout.sampling, self.policy.max_positions
        for name, split in splits_of(self.config):
            looked_at = None if split.check_cuts is None else split.check_cuts * split.num_sources
            clip, length = longest_prompt(self._dataloader(self.finite(split)), limit=looked_at)
            refuse_long(f"data.{name}: the prompt of {clip}", length, sampling, max_positions=positions)

    def _reference(self) -> FrozenReference:
        """The frozen start policy; also adds the policy's adapters and freezes what is not trained.

        Call it once the policy has its start weights.
        """
        return freeze_start(self.policy, self.config, self.tokenizer, batching=self.batching)

    def _rollout_engine(self) -> RolloutBackend:
        """The engine that generates the training rollouts; ValueError if it lacks something that they need."""
        rollout = self.config.rollout
        rate = self.config.data.train_ds.sample_rate
        return build_backend(
            rollout, self.config.model, self.policy, self.tokenizer, sample_rate=rate, directory=self.directory.path
        )

    def _backend(self, model: AudioLLM) -> MegatronRollout:
        """Engine for validation and test, which evaluate this process's models whatever engine generates rollouts."""
        return MegatronRollout(model, self.tokenizer, batch_size=self.config.rollout.batch_size)

    def _dataloader(
        self, split: DatasetConfig, *, drop_last: bool = False, rows: list[int] | None = None
    ) -> PromptLoader:
        dataset = PromptDataset(
            self.tokenizer,
            self.policy.num_audio_tokens,
            self.wording,
            rows=rows,
            replace_unreadable=split.max_unreadable > 0,
            open_ended=self.supervised,
        )
        return build_dataloader(split, prompt_dataset=dataset, drop_last=drop_last)

    def _evaluator(self, split: DatasetConfig, *, detailed: bool = False) -> Evaluator:
        return Evaluator(
            self._dataloader(split),
            rewards=self.config.rewards,
            sampling=self.config.rollout.sampling,
            reference=self.reference,
            detailed=detailed,
        )

    def _prompt_stream(self, split: DatasetConfig) -> PromptStream:
        mine = data_parallel_prompts(split.batch_size, self.config.steps_per_generation)
        phases = [
            PromptPhase(
                name=phase.name,
                dataloader=self._dataloader(phase.split, drop_last=True, rows=mine),
                steps=phase.steps,
            )
            for phase in split.in_phases()
        ]
        return PromptStream(phases, split.batch_size, max_unreadable=split.max_unreadable)

    def _build_trainer(self) -> TrainingLoop:
        config = self.config
        prompts = self._prompt_stream(config.data.train_ds)
        policy = wrap_data_parallel(self.policy, distributed_optimizer=not on_cpu_host())
        actor = MapoActor(policy, self.rollout, self.reference, config.resolved_objective, self.batching)
        scorer = RolloutScorer.of(config, self.tokenizer, self.special, build_tagger())
        return MapoTrainer(
            config,
            actor,
            scorer,
            build_optimizer(policy, config.model.optim),
            prompts,
            self.validate,
            CustomLoggerWrapper(experiment_loggers(config, self.directory)),
            SampleWriter(self.directory.rollouts, self.tokenizer, config.resolved_objective, keep_clip=self._keep_clip),
            CheckpointStore.of(config, self.directory.checkpoints),
            Timer(config.trainer.loop.max_time_per_run),
        )


def experiment_loggers(config: RunConfig, directory: RunDirectory) -> list[Any]:
    """metrics.jsonl and what NeMo's experiment manager sets up (TensorBoard, W&B, log files), on the main rank only."""
    if not is_main_rank():
        return []
    host = pl.Trainer(
        accelerator=config.trainer.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    settings = config.exp_manager
    exp_manager(
        host,
        {
            "explicit_log_dir": str(directory.logs),
            "create_tensorboard_logger": settings.create_tensorboard_logger,
            "create_wandb_logger": settings.create_wandb_logger,
            "wandb_logger_kwargs": {"name": directory.path.name, "project": PROJECT, **settings.wandb_logger_kwargs},
            "create_checkpoint_callback": False,
            "log_step_timing": False,
            "log_tflops_per_sec_per_gpu": False,
            "resume_if_exists": False,
        },
    )
    return [JsonLinesLogger(directory.metrics), *host.loggers, LivePage(directory.path)]


def peak_rss_gb() -> float:
    """Largest resident memory of this process so far."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (1024**3 if sys.platform == "darwin" else 1024**2)


def _set_up_host(config: RunConfig) -> None:
    install_cpu_host()
    model = config.model
    if config.trainer.accelerator == "gpu" and on_cpu_host():
        raise ValueError("trainer.accelerator=gpu: torch finds no CUDA device here; set it to cpu")
    initialize_parallel(
        tensor=model.tensor_model_parallel_size,
        pipeline=model.pipeline_model_parallel_size,
        expert=model.expert_model_parallel_size,
        seed=config.seed,
    )
    if config.trainer.num_threads is not None:
        torch.set_num_threads(config.trainer.num_threads)
    torch.manual_seed(config.seed)


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
