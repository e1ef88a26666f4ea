"""What the planner needs besides the config of the run."""

from nemo_mapo.config.base import config_class
from nemo_mapo.config.fields import Count, Positive, Seconds, Weight


@config_class
class PlanConfig:
    """Keys of `python examples/plan.py plan.KEY=VALUE`."""

    gpu_memory_gb: Positive = 80.0
    """Memory of one GPU, in 10^9 bytes; a layout that needs more is refused."""
    reserved_gb: Weight = 6.0
    """Reserved for what is not planned: CUDA context, communication buffers, kernels' workspaces, fragmentation."""
    sequence_tokens: Count | None = None
    """Prompt + completion of every row; null is the longest allowed, model.decoder.max_position_embeddings."""
    audio_seconds: Seconds = 30.0
    """Length of every clip."""
    vocab_size: Count | None = None
    """Tokens of the vocabulary; null reads it from the tokenizer of data.tokenizer."""
