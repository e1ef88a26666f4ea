"""Perception accuracy and omission rate of reasoning, from a judge that classifies its claims (in the style of CAFE).

The paper publishes neither its judge nor its prompt nor the denominators: all are required options.
"""

import argparse
import json
from pathlib import Path

from nemo_mapo.console import quiet_upstream, show_own_messages

quiet_upstream()

from nemo_mapo.config.rewards import JudgeConfig  # noqa: E402
from nemo_mapo.evaluation.cafe import FIELDS, KINDS, ClaimRules, read_reasoning, score_claims  # noqa: E402
from nemo_mapo.rewards.judged import judge_of  # noqa: E402


def main() -> None:
    """Judge, write the result beside the input, print both rates."""
    arguments = _arguments()
    show_own_messages()
    try:
        rules = ClaimRules(predicted=tuple(arguments.predicted), target=tuple(arguments.target))
        records = list(read_reasoning(arguments.input))
        judge = judge_of(JudgeConfig(base_url=arguments.base_url, model=arguments.model), arguments.cache)
        results = score_claims(records, judge, arguments.instructions.read_text(encoding="utf-8"), rules)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    output = arguments.output or arguments.input.with_suffix(".claims.json")
    output.write_text(json.dumps(results, indent=1), encoding="utf-8")
    for name in ("perception_accuracy", "omission_rate"):
        rate = results[name]
        print(f"{name.replace('_', ' ')}: " + ("no claims" if rate is None else f"{100 * rate['rate']:.1f} %"))
    print(f"{results['unjudged']} of {results['completions']} without a verdict; written: {output}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help=f"JSON lines with {', '.join(FIELDS)}")
    parser.add_argument("--base-url", required=True, help="URL of the judge's OpenAI-compatible server, including /v1")
    parser.add_argument("--model", required=True, help="the judge's model name on that server")
    parser.add_argument("--instructions", type=Path, required=True, help="text file that says how to classify claims")
    for name, meaning in (("predicted", "perception accuracy"), ("target", "omission rate")):
        described = f"kinds in the denominator of {meaning}: {', '.join(KINDS)}"
        parser.add_argument(f"--{name}", nargs="+", required=True, metavar="KIND", help=described)
    parser.add_argument("--cache", help="file that caches verdicts")
    parser.add_argument("--output", type=Path, help="(default: INPUT with .claims.json)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
