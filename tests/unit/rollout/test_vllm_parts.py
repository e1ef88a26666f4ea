"""Which models vLLM serves with their own encoder, and what it needs for them."""

from dataclasses import replace

import pytest

from nemo_mapo.config.model import ModelConfig, ProjectorConfig, QwenOmniPerceptionConfig
from nemo_mapo.config.rollout import VllmConfig
from nemo_mapo.rollout.vllm.model_directory import hears


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
