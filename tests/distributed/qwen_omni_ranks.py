"""What the ranks of the Qwen Omni tests run; apart, because a rank can import this file by its name only."""

from pathlib import Path
from typing import Any

import torch
from integration.qwen_omni_tiny import SAMPLE_RATE, Row, imported_model, our_logits, prompts_of

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.models.hf.convert import ORIGINAL
from nemo_mapo.models.hf.models import read_model
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.training.checkpoint import write_checkpoint
from support.tiny import tiny_tokenizer


def in_layout(
    imported: str, layout: dict[str, Any], rows: list[Row], new_tokens: int, saved: str
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Load what was imported in this layout; its logits (last stage), greedy continuations of the rows with one clip
    (or of all, if none has any), and a checkpoint written from here.
    """
    model = imported_model(Path(imported), layout)
    assert model.num_audio_tokens(SAMPLE_RATE) > 0
    logits = our_logits(model, rows)
    single = [row for row in rows if len(row[1]) == 1] or rows
    generated = MegatronRollout(model, tiny_tokenizer(), batch_size=len(single)).generate(
        prompts_of(single),
        SamplingConfig(temperature=0.0, min_new_tokens=new_tokens, max_new_tokens=new_tokens),
        group_size=1,
        seeds=torch.arange(len(single)),
    )
    if model.pre_process and not read_model(Path(imported) / ORIGINAL).has_perception:
        # The checkpoint of a text LLM is its decoder alone, as import makes it.
        del model.perception
    write_checkpoint(Path(saved), model)
    return logits, [one.token_ids.tolist() for (one,) in generated]
