"""What the ranks of the test of deaf tokens run; apart, because a rank can import this file by its name only."""

from pathlib import Path

import torch
from torch import Tensor

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.models.layout import MicroBatching, padded
from nemo_mapo.rollout.deaf import DeafTokens
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rows import Completion, ScoredRow
from nemo_mapo.training.checkpoint import load_checkpoint
from nemo_mapo.training.signals import token_signals_in_parts
from support.layouts import GROUP_SIZE, NUM_PROMPTS, ROWS, Layout, build
from support.tiny import TinyAudioLLM, tiny_prompts, tiny_tokenizer


def deaf_passes(layout: Layout, base: ModelConfig, start: str, rows: list[ScoredRow]) -> tuple[Tensor, Tensor, Tensor]:
    """On every rank: log-probs of the rows with deaf tokens, completions drawn with them, and drawn without."""
    config = layout.config(base)
    model = build(config, seed=99)
    load_checkpoint(Path(start), model)
    first = torch.arange(ROWS) % 3
    deaf = DeafTokens(first=first, end=first + 4, prompt_text=True)
    batching = MicroBatching.of(config)
    signals = token_signals_in_parts(model, rows, head_reduction=None, batching=batching, deaf=deaf)
    tokenizer = tiny_tokenizer()
    prompts = tiny_prompts(TinyAudioLLM(config=config, model=model, tokenizer=tokenizer), num_prompts=NUM_PROMPTS)
    backend = MegatronRollout(model, tokenizer, batch_size=ROWS)
    greedy, seeds = SamplingConfig(temperature=0.0, max_new_tokens=8), torch.zeros(ROWS, dtype=torch.int64)
    by_prompt = deaf.of(slice(0, NUM_PROMPTS))
    drawn = backend.generate(prompts, greedy, group_size=GROUP_SIZE, seeds=seeds, deaf=by_prompt)
    heard = backend.generate(prompts, greedy, group_size=GROUP_SIZE, seeds=seeds)
    return torch.cat([one.log_probs for one in signals]), _tokens(drawn), _tokens(heard)


def _tokens(drawn: list[list[Completion]]) -> Tensor:
    return padded([one.token_ids for completions in drawn for one in completions])
