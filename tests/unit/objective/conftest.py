from collections.abc import Callable

import pytest
import torch

from nemo_mapo.types import ObjectiveInputs


@pytest.fixture
def make_inputs() -> Callable[..., ObjectiveInputs]:
    """Two completions of three and two tokens, with figures simple enough to work by hand; override any field."""

    def build(**overrides: object) -> ObjectiveInputs:
        fields: dict[str, object] = {
            "log_probs": torch.tensor([[-1.0, -0.5, -2.0], [-1.5, -1.0, 0.0]], dtype=torch.float64, requires_grad=True),
            "old_log_probs": torch.tensor([[-1.0, -0.5, -2.0], [-1.5, -1.0, 0.0]], dtype=torch.float64),
            "ref_log_probs": torch.tensor([[-1.0, -0.5, -2.0], [-1.5, -1.0, 0.0]], dtype=torch.float64),
            "entropy_nats": torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64),
            "text_ref_entropy_nats": torch.tensor([[1.5, 2.0, 0.5], [1.0, 3.0, 0.0]], dtype=torch.float64),
            "audio_mass": torch.tensor([[0.5, 0.25, 0.1], [0.2, 0.4, 0.0]], dtype=torch.float64, requires_grad=True),
            "pos_gate": torch.tensor([[True, False, True], [False, True, False]]),
            "response_mask": torch.tensor([[True, True, True], [True, True, False]]),
            "advantages": torch.tensor([1.0, -1.0], dtype=torch.float64),
            "accuracy_rewards": torch.tensor([1.0, 0.0], dtype=torch.float64),
            "finished": torch.tensor([True, True]),
            "global_sequences": 2,
            "global_tokens": 5,
        }
        return ObjectiveInputs(**(fields | overrides))  # type: ignore[arg-type]

    return build
