"""What the engine asks of the machine before anything is built; TensorRT-LLM itself is not run anywhere here."""

from pathlib import Path

import pytest
import torch

from nemo_mapo.config.rollout import TrtllmConfig
from nemo_mapo.config.run import RolloutConfig
from nemo_mapo.rollout.factory import build_backend
from nemo_mapo.testing.tiny import SAMPLE_RATE, tiny_audio_llm


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_a_machine_without_a_gpu_is_told_so_with_what_runs_there(tmp_path: Path) -> None:
    tiny = tiny_audio_llm(qk_layernorm=False)
    config = RolloutConfig(backend="trtllm", trtllm=TrtllmConfig())
    with pytest.raises(ValueError, match=r"rollout\.backend=trtllm needs a GPU; rollout\.backend=megatron runs"):
        build_backend(config, tiny.config, tiny.model, tiny.tokenizer, sample_rate=SAMPLE_RATE, directory=tmp_path)
