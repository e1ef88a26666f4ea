"""Score predictions that were made elsewhere: reads a benchmark's file and a file of predictions, prints tables."""

import argparse
import json
from pathlib import Path
from typing import get_args

from nemo_mapo.config.evaluation import BenchmarkConfig, StatisticsConfig
from nemo_mapo.config.rewards import JudgeConfig
from nemo_mapo.evaluation.benchmarks.assemble import build_scorer, read_benchmark, scoring_notes
from nemo_mapo.evaluation.benchmarks.layouts import LAYOUTS
from nemo_mapo.evaluation.benchmarks.predictions import read_predictions
from nemo_mapo.evaluation.benchmarks.scoring import AnswerTemplate
from nemo_mapo.evaluation.benchmarks.tables import build_results, comparison_markdown
from nemo_mapo.rewards.judge import JudgeError
from nemo_mapo.statistics import compare_paired

_MAP_HELP = "key of a field in the items file if it differs from the published one; an empty key drops its table"


def main() -> None:
    """Print the tables, and write them to --output."""
    arguments = _arguments()
    try:
        print(_score(arguments))
    except (ValueError, JudgeError) as error:
        raise SystemExit(f"error: {error}") from error


def _score(arguments: argparse.Namespace) -> str:
    config = BenchmarkConfig(
        name=arguments.benchmark,
        items_path=str(arguments.items),
        fields={name: key or None for name, key in arguments.map},
        keep_defective=arguments.keep_defective,
        closed_rule="embedding" if arguments.embedding_model else "strict",
    )
    judge = JudgeConfig(
        base_url=arguments.judge_url, model=arguments.judge_model, embedding_model=arguments.embedding_model
    )
    statistics = StatisticsConfig()
    benchmark = read_benchmark(config)
    kept = None if arguments.output is None else arguments.output / "judgements.jsonl"
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
    scorer = build_scorer(benchmark, config, judge, arguments.template, kept)
    files = [arguments.predictions, *([arguments.compare] if arguments.compare else [])]
    scores = [scorer(read_predictions(file, benchmark, field=arguments.field)) for file in files]
    results = build_results(benchmark, scores[0], statistics, notes=scoring_notes(config, judge, arguments.template))
    text = results.markdown()
    if arguments.compare:
        values = [[score.value for score in run] for run in scores]
        comparison = compare_paired(
            *values, samples=statistics.bootstrap_samples, seed=statistics.seed, confidence=statistics.confidence
        )
        text += f"\n## {arguments.predictions} against {arguments.compare}\n\n{comparison_markdown(comparison)}"
    if arguments.output is not None:
        (arguments.output / "results.json").write_text(json.dumps(results.as_plain(), indent=2) + "\n")
        (arguments.output / "results.md").write_text(text)
    return text


def _pair(text: str) -> tuple[str, str]:
    name, equals, key = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=KEY")
    return name, key


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("benchmark", choices=sorted(LAYOUTS))
    parser.add_argument("--items", type=Path, required=True, help="the benchmark's published file")
    parser.add_argument("--predictions", type=Path, required=True, help=".json, .jsonl or .parquet with id, prediction")
    parser.add_argument(
        "--compare", type=Path, help="second file of predictions, for paired tests of first minus second"
    )
    parser.add_argument("--field", help="key of the predictions (default: the benchmark's; `completion` in our files)")
    parser.add_argument("--template", choices=get_args(AnswerTemplate), default="none",
                        help="template around the answer")  # fmt: skip
    parser.add_argument("--map", action="append", default=[], type=_pair, metavar="NAME=KEY", help=_MAP_HELP)
    parser.add_argument(
        "--keep-defective", action="store_true", help="keep items whose answer is not among the choices"
    )
    parser.add_argument("--judge-url", help="OpenAI-compatible server, for open-ended questions and embeddings")
    parser.add_argument("--judge-model", help="chat model that judges open-ended responses")
    parser.add_argument("--embedding-model", help="match closed questions by embeddings, as MMAU-Pro does")
    parser.add_argument("--output", type=Path, help="directory for results.json, results.md and judgements")
    return parser.parse_args()


if __name__ == "__main__":
    main()
