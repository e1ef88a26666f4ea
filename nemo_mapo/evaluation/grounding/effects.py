"""Effects of changed audio on accuracy: means, paired differences and ACS, with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nemo_mapo.config.analysis import AnalysisConfig
from nemo_mapo.evaluation.grounding.evidence import SELECTIONS
from nemo_mapo.statistics import compare_paired, score_interval

DIGITS = 5

Scores = Sequence[float]


def masking(selection: str, ratio: float) -> str:
    """Name of an evidence-masking condition."""
    return f"{selection} {ratio:g}"


@dataclass(frozen=True, kw_only=True)
class Effects:
    """Estimates over the questions of one analysis; scores are in the same order of questions in every condition."""

    scores: Mapping[str, Scores]
    """Accuracy of each question by condition: full, text_only, silence, exchanged, and those of evidence masking."""
    config: AnalysisConfig

    def accuracy(self, condition: str) -> dict[str, float]:
        """Mean with its interval."""
        return _rounded(asdict(score_interval(self.scores[condition], **self._statistics)))

    def lost(self, before: str, after: str) -> dict[str, float]:
        """Accuracy in `before` minus accuracy in `after`, paired over questions, with interval and p."""
        compared = compare_paired(self.scores[before], self.scores[after], **self._statistics)
        return _rounded({**asdict(compared.difference), "p_value": compared.p_value})

    def evidence(self) -> list[dict[str, Any]]:
        """Remaining accuracy for every ratio and selection, and the drop from the whole clip."""
        return [
            {
                "ratio": ratio,
                "selection": selection,
                **self.accuracy(masking(selection, ratio)),
                "drop": self.lost("full", masking(selection, ratio)),
            }
            for ratio in self.config.ratios
            for selection in SELECTIONS
        ]

    def acs(self) -> list[dict[str, float]]:
        """ACS(r) = Acc_random(r) - Acc_top(r) (Eq. 17): above 0 if the attended frames matter more than others."""
        return [
            {"ratio": ratio, **self.lost(masking("random", ratio), masking("top", ratio))}
            for ratio in self.config.ratios
        ]

    @property
    def _statistics(self) -> dict[str, Any]:
        config = self.config
        return {"samples": config.bootstrap_samples, "seed": config.seed, "confidence": config.confidence}


def _rounded(metrics: dict[str, float]) -> dict[str, float]:
    return {name: round(value, DIGITS) for name, value in metrics.items()}
