"""Serve rollouts over HTTP: `python examples/serve_rollouts.py [key=value ...]`; see --help and docs/rollouts.md."""

import sys
from pathlib import Path

from nemo_mapo.config.early import wants_gpu
from nemo_mapo.config.load import ConfigError
from nemo_mapo.config.serving import ServeConfig, register_serving_defaults, validate_serving
from nemo_mapo.console import quiet_upstream, show_own_messages
from nemo_mapo.platform import hide_cuda_devices

register_serving_defaults()
if not wants_gpu(sys.argv[1:], config_dir=Path(__file__).parents[1] / "conf", config_name="serve_rollouts"):
    hide_cuda_devices()
quiet_upstream()

from nemo.core.config import hydra_runner  # noqa: E402
from omegaconf import DictConfig  # noqa: E402


@hydra_runner(config_path="../conf", config_name="serve_rollouts")
def main(composed: DictConfig) -> None:
    """Check the composed config, then serve."""
    show_own_messages()
    try:
        config = validate_serving(composed)
    except ConfigError as error:
        sys.exit(str(error))
    quiet_upstream()
    try:
        run(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


def run(config: ServeConfig) -> None:
    """Build the model as a trainer builds it, and serve it."""
    import torch

    from nemo_mapo.data.tokenizer import SpecialTokens, load_tokenizer
    from nemo_mapo.models.lora import add_lora
    from nemo_mapo.platform import initialize_parallel, install_cpu_host, on_cpu_host
    from nemo_mapo.rollout.megatron import MegatronRollout
    from nemo_mapo.rollout.server.engine import WeightId
    from nemo_mapo.rollout.server.policy import ServedPolicy
    from nemo_mapo.rollout.server.run import serve
    from nemo_mapo.training.build import build_audio_llm
    from nemo_mapo.training.checkpoint import load_checkpoint

    install_cpu_host()
    if config.trainer.accelerator == "gpu" and on_cpu_host():
        raise ValueError("trainer.accelerator=gpu: torch finds no CUDA device here; set it to cpu")
    initialize_parallel()
    if config.trainer.num_threads is not None:
        torch.set_num_threads(config.trainer.num_threads)
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = build_audio_llm(
        config.model,
        vocab_size=len(tokenizer),
        special=SpecialTokens.from_tokenizer(tokenizer),
        sample_rate=config.data.sample_rate,
        seed=0,
        params_dtype=torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32,
    )
    checkpoint = config.pretrained_checkpoint.restore_from_path
    weights = None
    if checkpoint is not None:
        load_checkpoint(Path(checkpoint), model)
        weights = WeightId(version=0, digest=str(Path(checkpoint).resolve()))
    if config.model.lora is not None:
        add_lora(model.language_model, config.model.lora, seed=0)
    rollout = MegatronRollout(model, tokenizer, batch_size=config.rollout.batch_size)
    serve(
        ServedPolicy(rollout),
        config.serving,
        sample_rate=config.data.sample_rate,
        weights=weights,
        announce=lambda address: print(f"serving at {address}", flush=True),
    )


if __name__ == "__main__":
    main()
