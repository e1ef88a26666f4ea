"""Servers that the tests of this folder share; each takes most of a minute to start."""

from collections.abc import Iterator

import pytest

from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.rollout.vllm.backend import VllmRollout
from tests.vllm.serving import embedded_policy, launched


@pytest.fixture(scope="session")
def policy() -> AudioLLM:
    return embedded_policy(0)


@pytest.fixture(scope="session")
def shared(policy: AudioLLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmRollout]:
    """The embedded policy's server."""
    with launched(policy, tmp_path_factory.mktemp("vllm")) as backend:
        yield backend
