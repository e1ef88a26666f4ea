"""Builds a benchmark and its scorer from the config; needs neither a model nor torch."""

from pathlib import Path

from nemo_mapo.config.evaluation import BenchmarkConfig
from nemo_mapo.config.rewards import JudgeConfig
from nemo_mapo.evaluation.benchmarks import own
from nemo_mapo.evaluation.benchmarks.items import Benchmark, load_benchmark
from nemo_mapo.evaluation.benchmarks.layouts import LAYOUTS
from nemo_mapo.evaluation.benchmarks.open_ended import OpenEndedJudge
from nemo_mapo.evaluation.benchmarks.scoring import AnswerTemplate, NamesChoice, NearestChoice, Scorer, named_choice
from nemo_mapo.rewards.judge import OpenAIClient


def read_benchmark(config: BenchmarkConfig) -> Benchmark:
    """Read the published file, or your own questions; ValueError as in `load_benchmark` and `load_own_benchmark`."""
    if config.name == own.LAYOUT.name:
        if config.keep_defective:
            raise ValueError(
                "benchmark.keep_defective=true is for published files; correct your own: every answer has to be one of "
                "the choices"
            )
        root = None if config.audio_root is None else Path(config.audio_root)
        return own.load_own_benchmark(Path(config.items_path), config.fields, audio_root=root)
    layout = LAYOUTS[config.name].with_fields(config.fields)
    return load_benchmark(Path(config.items_path), layout, keep_defective=config.keep_defective)


def build_scorer(
    benchmark: Benchmark, config: BenchmarkConfig, judge: JudgeConfig, template: AnswerTemplate, judgements: Path | None
) -> Scorer:
    """Build the scorer; `judgements` is the file that keeps the judge's replies.

    Raises:
        ValueError: a model that the scores need is not named.
    """
    client = OpenAIClient(judge) if judge.base_url is not None else None
    names_choice: NamesChoice = named_choice
    if config.closed_rule == "embedding":
        if client is None or judge.embedding_model is None:
            raise ValueError(
                "matching closed questions by embeddings needs judge.base_url and judge.embedding_model: set both"
            )
        names_choice = NearestChoice(client)
    rater = None
    if client is not None and judge.model is not None:
        rater = OpenEndedJudge(client, file=judgements, attempts=judge.max_attempts, concurrency=judge.concurrency)
    return Scorer(benchmark, template=template, judge=rater, names_choice=names_choice, concurrency=judge.concurrency)


def scoring_notes(config: BenchmarkConfig, judge: JudgeConfig, template: AnswerTemplate) -> list[str]:
    """Notes for readers of the results: what the score depends on."""
    model = f" by {judge.embedding_model}" if config.closed_rule == "embedding" else ""
    notes = [f"template: {template}; closed questions: {config.closed_rule} matching{model}"]
    if judge.model is not None:
        notes.append(f"open-ended questions, if there are any, judged by {judge.model}")
    return notes
