"""What `examples/analyse.py` measures on a finished run."""

from typing import Annotated

from pydantic import Field

from nemo_mapo.config.base import config_class
from nemo_mapo.config.fields import AtLeastTwo, Count, OpenFraction, OrderSeed


@config_class
class AnalysisConfig:
    """Settings of the analysis that change its numbers; they are recorded with the results."""

    max_items: AtLeastTwo | None = None
    """Use only this many questions of the split, drawn at random with `seed`."""
    batch_size: AtLeastTwo | None = None
    """Questions per batch; null uses the split's batch size. Clips are exchanged within a batch."""
    ratios: Annotated[tuple[OpenFraction, ...], Field(min_length=1)] = (0.05, 0.1, 0.3, 0.5)
    """Shares of a clip that evidence masking silences (Table 4)."""
    samples_per_item: AtLeastTwo = 4
    """Completions of each question, sampled as in training, for accuracy against length."""
    collapse_threshold: OpenFraction = 0.5
    """A completion has collapsed when its collapse index is above this."""
    late_after: Annotated[str, Field(min_length=1)] | None = None
    """Late tokens are those after the first occurrence of this text in a completion, early ones those before it (a
    description's full stop, say); null takes the last and the first third."""
    seed: OrderSeed = 0
    """Seed for choosing questions, random masks and sampling."""
    bootstrap_samples: Count = 2000
    """Bootstrap samples for the intervals."""
    confidence: OpenFraction = 0.95
    """Confidence level of the intervals."""
