"""What a process of the recipes' test runs."""

import torch.distributed as dist

from nemo_mapo.config.run import RunConfig
from nemo_mapo.platform import install_cpu_host
from nemo_mapo.training.plan import static_memory


def trained_bytes(config: RunConfig) -> int:
    """Gradients of the first rank's part of the model, built without storage in the config's layout."""
    install_cpu_host()
    # The planner pretends to be a rank of the whole run.
    dist.destroy_process_group()
    assert config.model.decoder.vocab_size is not None
    return static_memory(config, stage=0, vocab_size=config.model.decoder.vocab_size).gradients
