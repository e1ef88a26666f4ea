"""Files of grounding analyses: read, and refused side by side if they did not ask the same in the same way."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEARD = {"full": "its clip", "exchanged": "another clip", "silence": "silence", "text_only": "text alone"}
"""What the model was given, by name in the file."""
BLOCKED = {
    "full": "hears throughout",
    "deaf_late": "late tokens deaf",
    "deaf_early": "early tokens deaf",
    "deaf_completion": "completion deaf",
    "deaf_target_layers": "completion deaf in target layers",
    "only_late": "only late tokens hear",
}
"""For which tokens attention to the audio was blocked, by name in the file."""
NEEDED = {"checkpoint", "split", "items", "items_in_split", "ids", "chance", "examples", "scores", "settings",
          "accuracy", "needs_ears", "profile", "heads", "collapse", "untagged_completions", "parts_of_speech",
          "causal", "evidence", "acs", "length"}  # fmt: skip
"""What a page reads of an analysis."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """An analysis file and what the page calls it."""

    label: str
    results: Mapping[str, Any]
    run_dir: Path
    """Where its clips are kept."""


def read_analysis(path: Path, label: str) -> Analysis:
    """Read a file that examples/analyse.py wrote; ValueError if it is none."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no analysis ({error}); make it with examples/analyse.py") from error
    if not isinstance(results, dict) or (missing := sorted(NEEDED - results.keys())):
        raise ValueError(f"{path}: {', '.join(missing) if isinstance(results, dict) else 'everything'} missing; "
                         "make it again with examples/analyse.py")  # fmt: skip
    return Analysis(label=label, results=results, run_dir=path.parent.parent)


def newest_analysis(run_dir: Path) -> Path:
    """The analysis file of a run directory that was written last; ValueError if there is none."""
    found = sorted((run_dir / "analysis").glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"{run_dir} has no analysis; make one: python examples/analyse.py {run_dir}")
    return found[-1]


def refuse_incomparable(analyses: Sequence[Analysis]) -> None:
    """ValueError if the analyses did not ask the same questions in the same way."""
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
