"""MMAR-Rubrics: score the reasoning of predictions by the rubric of each item, with your own judge."""

import argparse
import json
import os
from pathlib import Path

from nemo_mapo.config.rewards import JudgeConfig
from nemo_mapo.evaluation.benchmarks.rubrics import (
    RubricJudge,
    RubricPrompt,
    read_reasoned,
    read_rubric_items,
    summary,
)
from nemo_mapo.rewards.judge import JudgeError, OpenAIClient
from nemo_mapo.statistics import score_interval

SAMPLES = 10_000
"""Of the bootstrap."""


def main() -> None:
    """Print the score, and write everything to --output."""
    arguments = _arguments()
    try:
        print(_score(arguments))
    except (ValueError, JudgeError) as error:
        raise SystemExit(f"error: {error}") from error


def _score(arguments: argparse.Namespace) -> str:
    prompt = RubricPrompt(arguments.prompt)
    items = read_rubric_items(arguments.items)
    said = read_reasoned(arguments.predictions, items)
    config = JudgeConfig(base_url=arguments.judge_url, model=arguments.judge_model, max_tokens=arguments.max_tokens)
    arguments.output.mkdir(parents=True, exist_ok=True)
    judge = RubricJudge(
        OpenAIClient(config),
        prompt,
        file=arguments.output / "ratings.jsonl",
        attempts=arguments.attempts,
        concurrency=config.concurrency,
    )
    scores = judge(items, said)
    found = summary(items, scores)
    interval = score_interval([score.value for score in scores], samples=SAMPLES, seed=0)
    found |= {"judge": arguments.judge_model, "low": interval.low, "high": interval.high}
    (arguments.output / "rubrics.json").write_text(json.dumps(found, indent=2) + "\n")
    lines = [
        f"MMAR-Rubrics: {100 * found['score']:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}] over all "
        f"{len(items)} items ({len(items) - len(said)} without a prediction), judge {arguments.judge_model}",
        f"right answers by MMAR's own rule: {100 * found['accuracy']:.1f} %"
        + ("" if found["of_right"] is None else f"; their reasoning: {100 * found['of_right']:.1f} %"),
    ]
    for groups in found["by_group"].values():
        lines += [f"  {name}: {100 * group['score']:.1f} % of {group['items']}" for name, group in groups.items()]
    return os.linesep.join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=Path, required=True, help="MMAR-meta.jsonl with rubrics")
    parser.add_argument("--predictions", type=Path, required=True,
                        help=".json or .jsonl with id, thinking_prediction, answer_prediction")  # fmt: skip
    parser.add_argument("--prompt", type=Path, required=True, help="file with MMAR's prompt (docs/evaluation.md)")
    parser.add_argument("--judge-url", required=True, help="OpenAI-compatible server")
    parser.add_argument("--judge-model", required=True, help="its chat model")
    parser.add_argument("--max-tokens", type=int, default=2048, help="of a reply")
    parser.add_argument("--attempts", type=int, default=3, help="how often to ask for a reply that has no scores")
    parser.add_argument("--output", type=Path, required=True, help="directory for rubrics.json and ratings.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
