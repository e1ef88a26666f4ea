"""Evaluates a model on a benchmark: generates missing predictions, then scores all."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from nemo_mapo.config.evaluation import EvaluationConfig
from nemo_mapo.config.load import as_plain
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.data.tokenizer import SpecialTokens, load_tokenizer
from nemo_mapo.evaluation.benchmarks.assemble import build_scorer, read_benchmark, scoring_notes
from nemo_mapo.evaluation.benchmarks.directory import EvaluationDirectory
from nemo_mapo.evaluation.benchmarks.items import Benchmark, Item
from nemo_mapo.evaluation.benchmarks.predictions import Prediction, submission
from nemo_mapo.evaluation.benchmarks.prompts import BenchmarkPrompts
from nemo_mapo.evaluation.benchmarks.records import read_records
from nemo_mapo.evaluation.benchmarks.scoring import AnswerTemplate, named_choice, read_answer
from nemo_mapo.evaluation.benchmarks.tables import build_results
from nemo_mapo.models.tensors import policy_tensors
from nemo_mapo.rewards.templates import prompt_wording
from nemo_mapo.rollout.checks import refuse_long
from nemo_mapo.rollout.factory import build_backend
from nemo_mapo.rollout.protocol import RolloutBackend
from nemo_mapo.training.build import build_audio_llm
from nemo_mapo.training.finished_run import recorded_wording
from nemo_mapo.training.policies import load_merged

logger = logging.getLogger(__name__)

_SEED_STRIDE = 2**32
"""More than any benchmark has items, so every item of every seed has its own random stream."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A rollout backend and the prompts that fit it."""

    backend: RolloutBackend
    prompts: BenchmarkPrompts
    max_positions: int
    """Tokens of a prompt and its completion, at most."""


EngineFactory = Callable[[EvaluationConfig, Path], Engine]
"""Builds an engine from config and audio root; called only if there is something to generate."""


def evaluate(config: EvaluationConfig, build_engine: EngineFactory) -> Path:
    """Evaluate as `config` says; return the directory with predictions and results.

    Raises:
        ValueError: an error that the user can fix: files, config, directory.
        JudgeError: a model needed for scoring cannot be reached; the predictions are kept.
    """
    benchmark = read_benchmark(config.benchmark)
    directory = EvaluationDirectory(Path(config.output_dir))
    settings = as_plain(config) | {"items_sha256": benchmark.digest}
    settings["data"]["prompt"] = asdict(prompt_wording(config.data.prompt, config.template))
    with directory.opened(settings):
        # Before generation, so that a missing judge is not discovered after hours.
        scorer = None
        if not benchmark.is_withheld:
            scorer = build_scorer(benchmark, config.benchmark, config.judge, config.template, directory.judgements)
        predictions = directory.read(benchmark)
        remaining = [(number, item) for number, item in enumerate(benchmark.items) if item.id not in predictions]
        if remaining:
            audio_root = Path(config.benchmark.audio_root or benchmark.path.parent)
            generate(remaining, build_engine(config, audio_root), config, directory)
            predictions = directory.read(benchmark)
        if scorer is None:
            _write_submission(benchmark, predictions, config.template, directory)
            return directory.path
        results = build_results(benchmark, scorer(predictions), config.statistics, notes=_notes(config))
        directory.write_results(results)
    logger.info(results.markdown())
    return directory.path


def generate(
    remaining: Sequence[tuple[int, Item]], engine: Engine, config: EvaluationConfig, directory: EvaluationDirectory
) -> None:
    """Generate a response to each item (given with its index in the benchmark), and write them batch by batch."""
    refuse = partial(refuse_long, sampling=config.rollout.sampling, max_positions=engine.max_positions)
    cut = engine.prompts.check([item for _, item in remaining], refuse)
    if cut:
        logger.info(f"{cut} of {len(remaining)} items have a clip longer than data.max_clip_seconds; it is truncated")
    size = config.rollout.batch_size
    for start in tqdm(range(0, len(remaining), size), desc=config.benchmark.name, unit="batch"):
        batch = remaining[start : start + size]
        numbers = [number for number, _ in batch]
        directory.append(_respond(engine, [item for _, item in batch], numbers, config.rollout.sampling, config.seed))


def checkpoint_engine(config: EvaluationConfig, audio_root: Path) -> Engine:
    """The engine of `rollout.backend` on a nemo-mapo checkpoint; this process's host and process groups are set up.

    Raises:
        ValueError: no checkpoint is named, or the model would be sharded over several processes.
        RolloutUnavailable: no vLLM server answers.
    """
    if spread := config.model.cut_over_ranks:
        raise ValueError(
            f"{', '.join(spread)}: evaluation runs in one process, set 1 (a checkpoint of any layout can be loaded)"
        )
    checkpoint = config.pretrained_checkpoint.restore_from_path
    if checkpoint is None:
        raise ValueError("pretrained_checkpoint.restore_from_path is not set: name the checkpoint to evaluate")
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    tokenizer = load_tokenizer(config.data.tokenizer)
    build = partial(
        build_audio_llm,
        config.model,
        vocab_size=len(tokenizer),
        special=SpecialTokens.from_tokenizer(tokenizer),
        sample_rate=config.data.sample_rate,
        seed=config.seed,
    )
    _warn_of_other_prompts(config, Path(checkpoint))
    model = build()
    load_merged(Path(checkpoint), model, build)
    backend = build_backend(
        config.rollout,
        config.model,
        model,
        tokenizer,
        sample_rate=config.data.sample_rate,
        directory=Path(config.output_dir),
    )
    backend.update_weights(0, policy_tensors(model))
    return Engine(
        backend=backend,
        prompts=BenchmarkPrompts(
            config.data,
            audio_root=audio_root,
            tokenizer=tokenizer,
            audio_tokens=model.num_audio_tokens,
            wording=prompt_wording(config.data.prompt, config.template),
            shuffle=config.shuffle_choices,
        ),
        max_positions=model.max_positions,
    )


def _warn_of_other_prompts(config: EvaluationConfig, checkpoint: Path) -> None:
    """Warn if the run that wrote the checkpoint was trained with differently worded prompts."""
    then = recorded_wording(checkpoint.resolve().parents[1])
    now = prompt_wording(config.data.prompt, config.template)
    if then is not None and then != now:
        logger.warning(
            f"data.prompt asks with {now}, and {checkpoint} was trained with {then}: scores may be those of a model "
            "that was asked for something else"
        )


def _respond(
    engine: Engine, items: Sequence[Item], numbers: Sequence[int], sampling: SamplingConfig, seed: int
) -> list[Prediction]:
    problems = engine.prompts(items)
    seeds = seed * _SEED_STRIDE + torch.tensor(numbers, dtype=torch.int64)
    prompts = [problem.prompt for problem in problems]
    drawn = engine.backend.generate(prompts, sampling, group_size=1, seeds=seeds)
    return [
        Prediction(
            id=problem.example.id,
            completion=one.text,
            finished=one.stopped,
            shown_choices=problem.example.choices,
        )
        for problem, (one,) in zip(problems, drawn, strict=True)
    ]


def _write_submission(
    benchmark: Benchmark,
    predictions: Mapping[str, Prediction],
    template: AnswerTemplate,
    directory: EvaluationDirectory,
) -> None:
    """Write the published records with the named choices, or the answer's own words if it names none."""
    answers = {}
    unparsable = 0
    for item in benchmark.items:
        prediction = predictions.get(item.id)
        answer = None if prediction is None else read_answer(prediction, template)
        named = named_choice(answer, item, prediction.shown_choices) if prediction and answer else None
        unparsable += named is None
        answers[item.id] = named or answer or ""
    path = directory.write_json("submission.json", submission(read_records(benchmark.path), benchmark, answers))
    logger.info(
        f"The answers of {benchmark.path} are withheld: hand {path} to the benchmark's authors. "
        f"{unparsable} of {len(benchmark.items)} responses name no choice."
    )


def _notes(config: EvaluationConfig) -> list[str]:
    order = "published" if config.shuffle_choices is None else f"shuffled with seed {config.shuffle_choices}"
    return [*scoring_notes(config.benchmark, config.judge, config.template), f"order of the choices: {order}"]
