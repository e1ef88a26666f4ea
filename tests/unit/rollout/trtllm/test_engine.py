"""What the engine asks of the machine before anything is built; TensorRT-LLM itself is not run anywhere here."""

import importlib.util
from pathlib import Path

import pytest
import torch

from nemo_mapo.config.rollout import TrtllmConfig
from nemo_mapo.config.run import RolloutConfig
from nemo_mapo.rollout.factory import build_backend
from nemo_mapo.rollout.trtllm.release import refuse_nemo, refuse_release
from support.tiny import SAMPLE_RATE, tiny_audio_llm

WITHOUT_EXPORT = r"NeMo \d\S* is installed, which has no nemo\.export.*NeMo 2\.3 of constraints\.txt"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_a_machine_without_a_gpu_or_a_nemo_without_export_is_told_so_with_what_runs_there(tmp_path: Path) -> None:
    tiny = tiny_audio_llm(qk_layernorm=False)
    config = RolloutConfig(backend="trtllm", trtllm=TrtllmConfig())
    without_gpu = r"rollout\.backend=trtllm needs a GPU; rollout\.backend=megatron runs"
    told = without_gpu if importlib.util.find_spec("nemo.export") else WITHOUT_EXPORT
    with pytest.raises(ValueError, match=told):
        build_backend(config, tiny.config, tiny.model, tiny.tokenizer, sample_rate=SAMPLE_RATE, directory=tmp_path)


@pytest.mark.parametrize("version", ["0.17.0", "0.20.0.post1", "1.2.1", "1.2.0rc3"])
def test_a_release_with_the_engine_backend_is_taken(version: str) -> None:
    refuse_release(version)


@pytest.mark.parametrize("version", ["0.12.0", "1.3.0", "2.0"])
def test_a_release_without_it_is_refused_by_its_version(version: str) -> None:
    with pytest.raises(ValueError, match=rf"TensorRT-LLM {version} is installed.*<1\.3.*1\.2\.1 is the last one"):
        refuse_release(version)


def test_a_nemo_without_export_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=WITHOUT_EXPORT):
        refuse_nemo("3.0.0")
