"""Reads the files of grounding analyses, and refuses to compare those of different questions or settings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEARD = {"full": "its clip", "exchanged": "another clip", "silence": "silence", "text_only": "text alone"}
"""What the model heard, by its name in the file."""
BLOCKED = {
    "full": "hears throughout",
    "deaf_late": "late tokens deaf",
    "deaf_early": "early tokens deaf",
    "deaf_completion": "completion deaf",
    "deaf_target_layers": "completion deaf in target layers",
    "only_late": "only late tokens hear",
}
"""Tokens for which attention to the audio was blocked, by their name in the file."""
NEEDED = {"checkpoint", "split", "items", "items_in_split", "ids", "chance", "examples", "scores", "settings",
          "accuracy", "accuracy_lost", "profile", "heads", "collapse", "untagged_completions", "parts_of_speech",
          "causal", "evidence", "acs", "length"}  # fmt: skip
"""Keys of an analysis that its page reads."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The content of an analysis file and its name on the page."""

    label: str
    results: Mapping[str, Any]
    run_dir: Path
    """Directory of the run, which has the clips."""


def read_analysis(path: Path, label: str) -> Analysis:
    """Read a file that examples/analyse.py wrote; ValueError if it is not one."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not an analysis ({error}); make one with examples/analyse.py") from error
    if not isinstance(results, dict) or (missing := sorted(NEEDED - results.keys())):
        raise ValueError(f"{path}: {', '.join(missing) if isinstance(results, dict) else 'everything'} missing; "
                         "rerun examples/analyse.py")  # fmt: skip
    return Analysis(label=label, results=results, run_dir=path.parent.parent)


def newest_analysis(run_dir: Path) -> Path:
    """The newest analysis file of a run directory; ValueError if there is none."""
    found = sorted((run_dir / "analysis").glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"{run_dir} has no analysis; make one: python examples/analyse.py {run_dir}")
    return found[-1]


def refuse_incomparable(analyses: Sequence[Analysis]) -> None:
    """ValueError if the analyses are of different questions or used different settings."""
    if not analyses:
        raise ValueError("name at least one analysis")
    first = analyses[0]
    for other in analyses[1:]:
        if first.results["ids"] != other.results["ids"]:
            shared = len(set(first.results["ids"]) & set(other.results["ids"]))
            raise ValueError(
                f"{first.label} has {first.results['items']} questions, {other.label} has {other.results['items']}, "
                f"and {shared} of them are shared, or their order differs: compare analyses of the same split"
            )
        settings = {
            name: (value, other.results["settings"].get(name))
            for name, value in first.results["settings"].items()
            if name != "max_items"
        }
        if changed := [f"{name} ({one} and {two})" for name, (one, two) in settings.items() if one != two]:
            raise ValueError(
                f"{first.label} and {other.label} differ in {', '.join(changed)}: analyse both with the same settings"
            )


def comparable(first: Analysis, second: Analysis) -> bool:
    """Whether two analyses may share a page."""
    try:
        refuse_incomparable([first, second])
    except ValueError:
        return False
    return True
