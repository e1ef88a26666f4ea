"""The policy's weights as a rollout engine of another process takes them."""

from collections.abc import Iterator

from torch import Tensor

from nemo_mapo.models.audio_llm import AudioLLM


def policy_tensors(policy: AudioLLM) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the policy's state, detached, one after the other; nothing is copied.

    The tensors are whole where the model is not cut over ranks, which the config demands of a run whose rollout engine
    asks for them (`RunConfig`).
    """
    for name, value in policy.state_dict().items():
        # Megatron's modules keep extra states beside the tensors: None, or bytes of Transformer Engine.
        if isinstance(value, Tensor):
            yield name, value
