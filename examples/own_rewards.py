"""A reward of your own, named as `type: custom, path: own_rewards:brief` in `rewards.terms` (docs/rewards.md)."""

from collections.abc import Sequence

from nemo_mapo.rewards.protocol import RewardSample


def brief(samples: Sequence[RewardSample], *, seconds_per_token: float = 0.02) -> list[float]:
    """1 for a completion with at most as many tokens as its clips allow, falling to 0 at twice as many."""
    values = []
    for sample in samples:
        allowed = sum(clip.duration_seconds for clip in sample.example.clips) / seconds_per_token
        values.append(max(0.0, min(1.0, 2.0 - sample.num_tokens / allowed)) if sample.finished else 0.0)
    return values
