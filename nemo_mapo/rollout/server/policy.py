"""A Megatron policy that takes its weights from elsewhere: what `examples/serve_rollouts.py` serves."""

from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rollout.protocol import Capabilities
from nemo_mapo.types import PromptBatch, Rollouts


class ServedPolicy:
    """A `RolloutBackend` on a model of its own, whose weights `update_weights` replaces."""

    def __init__(self, rollout: MegatronRollout) -> None:
        self.rollout = rollout

    @property
    def model(self) -> AudioLLM:
        """The model that generates."""
        return self.rollout.model

    @property
    def capabilities(self) -> Capabilities:
        """Those of the Megatron backend."""
        return self.rollout.capabilities

    @property
    def weight_version(self) -> int:
        """Version of the last update."""
        return self.rollout.weight_version

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take all tensors of the model's state, whole; the old ones stay unless every one fits.

        Raises:
            ValueError: naming tensors that are missing, unknown, or of another shape or type.
        """
        own = {name: value for name, value in self.model.state_dict().items() if isinstance(value, Tensor)}
        given = dict(tensors)
        if missing := sorted(own.keys() - given.keys()):
            raise ValueError(f"the update lacks {len(missing)} tensors of the served model, among them {missing[0]}")
        if unknown := sorted(given.keys() - own.keys()):
            raise ValueError(f"the served model has no tensor {unknown[0]} ({len(unknown)} such in the update)")
        for name, value in given.items():
            if (value.shape, value.dtype) != (own[name].shape, own[name].dtype):
                raise ValueError(
                    f"{name} is {value.dtype} of shape {tuple(value.shape)} in the update, {own[name].dtype} of shape "
                    f"{tuple(own[name].shape)} in the served model; start trainer and server with the same model config"
                )
        with torch.no_grad():
            for name, value in given.items():
                own[name].copy_(value)
        self.rollout.update_weights(version, ())

    def generate(
        self, prompts: PromptBatch, sampling: SamplingConfig, *, group_size: int, seeds: Int[Tensor, " batch"]
    ) -> Rollouts:
        """Sample completions; see `RolloutBackend.generate`."""
        return self.rollout.generate(prompts, sampling, group_size=group_size, seeds=seeds)

    def release(self) -> None:
        """Nothing: nobody trains here."""
