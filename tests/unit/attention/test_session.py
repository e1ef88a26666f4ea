"""A session hands masks down and masses up, for one forward at a time, and never stays silent about a gap."""

import pytest
import torch

from nemo_mapo.attention.session import AttentionSession

MASK = torch.tensor([[True, False]])
LAYER_1 = torch.tensor([[[0.2, 0.8], [0.4, 0.6]]])
LAYER_3 = torch.tensor([[[1.0, 0.0], [0.0, 0.2]]])


def captured_session() -> AttentionSession:
    session = AttentionSession([3, 1])
    with session.forward(audio_key_mask=MASK):
        session.record(3, LAYER_3)
        session.record(1, LAYER_1)
    return session


def test_mass_is_the_layer_mean_of_the_head_maximum_or_mean() -> None:
    session = captured_session()
    torch.testing.assert_close(session.audio_mass("max"), torch.tensor([[0.7, 0.5]]))
    torch.testing.assert_close(session.audio_mass("mean"), torch.tensor([[0.4, 0.4]]))


def test_head_masses_come_by_zero_based_layer_in_order() -> None:
    masses = captured_session().layer_head_masses()
    assert list(masses) == [1, 3]
    assert masses[3] is LAYER_3


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises((ValueError, TypeError)):
        captured_session().audio_mass("median")


def test_only_target_layers_are_captured_and_only_with_an_audio_mask() -> None:
    session = AttentionSession([1])
    with session.forward(audio_key_mask=MASK):
        assert session.captures(1) and not session.captures(0)
    with session.forward():
        assert not session.captures(1)


def test_a_silent_target_layer_is_an_error() -> None:
    session = AttentionSession([1, 3])
    with session.forward(audio_key_mask=MASK):
        session.record(1, LAYER_1)
    with pytest.raises(RuntimeError, match=r"no audio mass from layers \[3\]"):
        session.audio_mass()


def test_masses_do_not_survive_into_the_next_forward() -> None:
    session = captured_session()
    with session.forward():
        pass
    with pytest.raises(RuntimeError, match=r"no audio mass from layers \[1, 3\]"):
        session.layer_head_masses()


def test_a_failed_forward_leaves_no_masses_and_no_active_forward() -> None:
    session = AttentionSession([1])
    with pytest.raises(KeyError), session.forward(audio_key_mask=MASK):
        session.record(1, LAYER_1)
        raise KeyError
    with pytest.raises(RuntimeError, match="no audio mass"):
        session.audio_mass()
    with session.forward():
        pass


def test_forwards_do_not_nest() -> None:
    session = AttentionSession([0])
    with session.forward(), pytest.raises(RuntimeError, match="do not nest"), session.forward():
        pass


def test_outside_a_forward_nothing_is_captured() -> None:
    assert not captured_session().captures(1)


def test_a_layer_reports_once_per_forward() -> None:
    session = AttentionSession([1])
    with session.forward(audio_key_mask=MASK):
        session.record(1, LAYER_1)
        with pytest.raises(RuntimeError, match="ran twice"):
            session.record(1, LAYER_1)


@pytest.mark.parametrize(("layers", "complaint"), [([], "empty"), ([-1], "numbered from 0"), ([2, 2], "twice")])
def test_impossible_target_layers_are_refused(layers: list[int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AttentionSession(layers)
