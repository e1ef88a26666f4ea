"""Which models vLLM serves with their own encoder."""

from nemo_mapo.config.model import ModelConfig, ProjectorConfig, QwenOmniPerceptionConfig
from nemo_mapo.rollout.vllm.model_directory import hears


def test_an_encoder_with_a_projector_of_ours_is_not_one_that_vllm_knows():
    def model(projector: ProjectorConfig | None) -> ModelConfig:
        perception = QwenOmniPerceptionConfig(family="qwen3_omni_moe", encoder={}, features={}, projector=projector)
        return ModelConfig(perception=perception)

    assert hears(model(None)) and not hears(model(ProjectorConfig())) and not hears(ModelConfig())
