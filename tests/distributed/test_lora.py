"""Adapters in a split decoder: a training step, the base behind them and their checkpoint equal one process's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from nemo_mapo.config.adapters import LoraConfig
from nemo_mapo.config.model import ModelConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.lora import adapters_off, add_lora, is_adapter, merged_state_dict
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.testing.layouts import (
    ROWS,
    Layout,
    Outcome,
    batch_share,
    build,
    dense_config,
    hard_batch,
    relative,
    relative_figure,
    replicas_differ,
    sharded_gradients,
)
from nemo_mapo.testing.ranks import run_on_ranks
from nemo_mapo.testing.tiny import TinyAudioLLM, tiny_tokenizer
