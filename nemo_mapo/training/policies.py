"""The policy of a run and its frozen start, built from the run's config: for training and later analysis."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.adapters import LoraConfig
from nemo_mapo.config.run import RunConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import MicroBatching
from nemo_mapo.models.lora import add_lora, freeze, merged_state_dict
from nemo_mapo.models.nemo_encoder import load_encoder
from nemo_mapo.models.perception import NemoPerception
from nemo_mapo.training.build import build_audio_llm
from nemo_mapo.training.checkpoint import followed, has_adapters, load_checkpoint, load_part, read_checkpoint
from nemo_mapo.training.finished_run import read_run_config
from nemo_mapo.training.references import FrozenReference, OwnReference

logger = logging.getLogger(__name__)


def build_policy(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> AudioLLM:
    """The model with weights drawn from its seed, without adapters."""
    return build_audio_llm(
        config.model,
        vocab_size=len(tokenizer),
        special=SpecialTokens.from_tokenizer(tokenizer),
        sample_rate=config.data.train_ds.sample_rate,
        seed=config.warm_start.seed if config.warm_start else config.seed,
        params_dtype=torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32,
    )


WarmStarter = Callable[[AudioLLM, RunConfig, PreTrainedTokenizerBase], None]
"""Gives a fresh policy the weights that `warm_start` of the config describes."""


def load_start_weights(
    policy: AudioLLM, config: RunConfig, tokenizer: PreTrainedTokenizerBase, warm_starter: WarmStarter
) -> None:
    """Load the start weights into a fresh policy: a checkpoint, or the warm start (trained if it is not cached)."""
    start = config.pretrained_checkpoint.restore_from_path
    encoder = config.model.restored_encoder
    if encoder is not None:
        if start is not None:
            if adapters_of_start(Path(start)) is not None:
                raise ValueError(
                    f"pretrained_checkpoint.restore_from_path={start} holds LoRA adapters, which are not merged if "
                    "model.perception.restore_from_path replaces the encoder: start from RUN/merged of an SFT run"
                )
            load_part(Path(start), policy, "language_model")
        if policy.pre_process:
            assert isinstance(policy.perception, NemoPerception)
            load_encoder(policy.perception, Path(encoder))
    elif start is not None:
        load_merged(Path(start), policy, partial(build_policy, config, tokenizer))
    elif config.warm_start is not None:
        warm_starter(policy, config, tokenizer)
    else:
        logger.warning("model.from_scratch=true: training starts from random weights")


def load_merged(checkpoint: Path, policy: AudioLLM, build: Callable[[], AudioLLM]) -> None:
    """Load a checkpoint of any run into a policy without adapters; those that it holds are merged.

        load_merged(Path("runs/sft/checkpoints/best"), policy, partial(build_policy, config, tokenizer))

    Args:
        checkpoint: `RUN/checkpoints/step_N` or `best`, `RUN/merged`, or what an importer wrote.
        policy: takes the weights.
        build: makes another such policy, which takes the adapters for the moment, if there are any.

    Raises:
        ValueError: as `load_checkpoint` and `adapters_of_start`.
    """
    adapters = adapters_of_start(checkpoint)
    if adapters is None:
        load_checkpoint(checkpoint, policy)
        return
    adapted = build()
    add_lora(adapted.language_model, adapters, seed=0)
    load_checkpoint(checkpoint, adapted)
    _merge_into(policy, adapted)


def adapters_of_start(start: Path) -> LoraConfig | None:
    """The adapters that a checkpoint holds, as the run that wrote it has recorded them; None if it holds none.

    Raises:
        ValueError: as `read_checkpoint`; or the checkpoint, which knows no alpha, is not in its run's directory.
    """
    read_checkpoint(start)
    if not has_adapters(start):
        return None
    run_dir = followed(start).absolute().parents[1]
    where = f"{start} holds LoRA adapters"
    try:
        adapters = read_run_config(run_dir).model.lora
    except ValueError as error:
        raise ValueError(
            f"{where}, and the config.yaml of its run, which says their alpha, cannot be read ({error}): name the "
            "checkpoint in its run directory (RUN/checkpoints/step_N), or start from RUN/merged of an SFT run"
        ) from error
    if adapters is None:
        raise ValueError(f"{where}, but {run_dir / 'config.yaml'} has no model.lora: it is not of the same run")
    return adapters


def lora_alpha_of(checkpoint: Path, stated: float | None) -> float | None:
    """The alpha of a checkpoint's adapters, from its run's config.yaml; None if it holds none.

    Args:
        checkpoint: of a run, or an importer's.
        stated: for a checkpoint outside of its run's directory.

    Raises:
        ValueError: as `adapters_of_start`; or `stated` is not the run's.
    """
    try:
        adapters = adapters_of_start(checkpoint)
    except ValueError:
        if stated is None:
            raise
        return stated
    recorded = None if adapters is None else adapters.alpha
    if stated not in (None, recorded):
        run = "it holds no LoRA adapters" if recorded is None else f"its run has model.lora.alpha={recorded}"
        raise ValueError(f"{checkpoint}: alpha {stated} is given, but {run}; leave it out")
    return recorded


def freeze_start(
    policy: AudioLLM, config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, batching: MicroBatching
) -> FrozenReference:
    """The present policy as a reference; adds adapters to the policy and freezes what is not trained."""
    start = policy
    if config.model.lora is None:
        start = build_policy(config, tokenizer)
        start.load_state_dict(policy.state_dict())
    else:
        add_lora(policy.language_model, config.model.lora, seed=config.seed)
    freeze(policy, config.model.resolved_freeze)
    return FrozenReference(
        start,
        SpecialTokens.from_tokenizer(tokenizer),
        keep_placeholders=config.objective.keep_placeholders,
        batching=batching,
        adapted=config.model.lora is not None,
        offload=config.model.offload_reference,
    )


def prepare_for_targets(
    policy: AudioLLM, config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, batching: MicroBatching
) -> FrozenReference:
    """Add adapters to a policy for SFT and freeze what is not trained; returns it as its own reference."""
    if config.model.lora is not None:
        add_lora(policy.language_model, config.model.lora, seed=config.seed)
    freeze(policy, config.model.resolved_freeze)
    return OwnReference(policy, SpecialTokens.from_tokenizer(tokenizer), batching=batching)


def merged_policy(policy: AudioLLM, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> AudioLLM:
    """The same policy in a new model, its adapters added to the weights."""
    merged = build_policy(config, tokenizer)
    _merge_into(merged, policy)
    return merged


def _merge_into(plain: AudioLLM, adapted: AudioLLM) -> None:
    plain.language_model.load_state_dict(merged_state_dict(adapted.language_model))
    if adapted.pre_process:
        plain.perception.load_state_dict(adapted.perception.state_dict())
