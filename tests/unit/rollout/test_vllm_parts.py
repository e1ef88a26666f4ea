"""Which models vLLM serves with their own encoder, what it needs for them, and what is served at all."""

import base64
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_mapo.config.model import ModelConfig, ProjectorConfig, QwenOmniPerceptionConfig
from nemo_mapo.config.rollout import VllmConfig
from nemo_mapo.rollout.vllm.build import served
from nemo_mapo.rollout.vllm.model_directory import hears
from nemo_mapo.rollout.vllm.requests import PromptEmbeddings
from support.tiny import tiny_audio_llm, tiny_prompts
from tests.integration.trainers import config_of


def test_an_encoder_with_a_projector_of_ours_is_not_one_that_vllm_knows():
    def model(projector: ProjectorConfig | None) -> ModelConfig:
        perception = QwenOmniPerceptionConfig(family="qwen3_omni_moe", encoder={}, features={}, projector=projector)
        return ModelConfig(perception=perception)

    assert hears(model(None)) and not hears(model(ProjectorConfig())) and not hears(ModelConfig())


def test_qwen_omni_needs_its_directory_and_clips_filled_up_as_vllm_fills_them():
    perception = QwenOmniPerceptionConfig(family="qwen3_omni_moe", encoder={}, features={})
    model = ModelConfig(perception=perception)
    with pytest.raises(ValueError, match=r"rollout\.vllm\.original is not set"):
        VllmConfig().check_model(model)
    with pytest.raises(ValueError, match=r"set model\.perception\.whole_frames=true"):
        VllmConfig(original="models/qwen").check_model(model)
    VllmConfig(original="models/qwen").check_model(replace(model, perception=replace(perception, whole_frames=True)))
    # Prompts of a model from parts are embeddings: vLLM serves its decoder only.
    VllmConfig().check_model(replace(model, perception=replace(perception, projector=ProjectorConfig())))


def test_a_server_for_other_machines_needs_a_key_and_a_run_that_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ValueError, match=r"rollout\.vllm is not set: add rollout=vllm"):
        served(config_of(tmp_path, tmp_path))
    with pytest.raises(ValueError, match=r"rollout\.vllm\.host=0\.0\.0\.0 listens to other.*key VLLM_API_KEY"):
        served(config_of(tmp_path, tmp_path, "rollout=vllm", "rollout.vllm.host=0.0.0.0"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_sent_without_padding_in_the_policys_type(dtype: torch.dtype) -> None:
    tiny = tiny_audio_llm(dtype=dtype)
    prompts = tiny_prompts(tiny)
    for prompt, made in zip(prompts, PromptEmbeddings(tiny.model, "policy").prompts(prompts), strict=True):
        sent = torch.load(io.BytesIO(base64.b64decode(made.body["prompt_embeds"])))
        assert sent.dtype == dtype and sent.shape == (len(prompt), tiny.model.config.hidden_size)
