"""What the ranks of the adapter tests run; apart, because a rank can import this file by its name and no test file."""

from pathlib import Path

import torch
from torch import Tensor

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.lora import adapters_off, is_adapter, merged_state_dict
from nemo_mapo.training.checkpoint import load_checkpoint, write_checkpoint
from support.layouts import Layout, build, dense_config, relative
from support.tiny import TinyAudioLLM, tiny_batch, tiny_tokenizer


def save_fresh(layout: Layout, base: ModelConfig, folder: str) -> None:
    """Save a model as it is built in this layout."""
    write_checkpoint(Path(folder), build(layout.config(base)))


def save_again(layout: Layout, base: ModelConfig, start: str, folder: str) -> None:
    """Load in this layout, and save."""
    model = build(layout.config(base), seed=99)
    load_checkpoint(Path(start), model)
    write_checkpoint(Path(folder), model)


def whole_adapters(base: ModelConfig, folder: str) -> dict[str, Tensor]:
    """In one process: the adapters of a checkpoint."""
    model = build(base, seed=98)
    load_checkpoint(Path(folder), model)
    return {name: parameter.detach() for name, parameter in model.named_parameters() if is_adapter(name)}


@torch.no_grad()
def base_and_merged(layout: Layout, base: ModelConfig, start: str) -> tuple[bool, float, float]:
    """Whether adapters off is the base bit for bit; how far merging, and how far the adapters, move the logits."""
    model, plain = build(layout.config(base), seed=99), build(layout.config(dense_config()), seed=98)
    load_checkpoint(Path(start), model)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not is_adapter(name)})
    base_logits, adapted_logits = logits_of(plain), logits_of(model)
    plain.language_model.load_state_dict(merged_state_dict(model.language_model))
    merged = logits_of(plain)
    with adapters_off(model):
        off = logits_of(model)
    return torch.equal(off, base_logits), relative(merged, adapted_logits), relative(base_logits, adapted_logits)


def logits_of(model: AudioLLM) -> Tensor:
    """Logits of some prompts; 0 where there is no word."""
    prompts = tiny_batch(TinyAudioLLM(config=dense_config(), model=model, tokenizer=tiny_tokenizer()), num_prompts=2)
    logits: Tensor = model(prompts.tokens, prompts.audio, prompts.audio_row).logits
    return logits.nan_to_num(neginf=0.0)
