"""Kept encodings: the same as computed anew, bounded, and never those of other weights."""

import torch
from torch import Tensor, nn

from nemo_mapo.models.encoded_clips import EncodedClips


class Calls:
    """An encoder of one weight that counts what it is asked for."""

    def __init__(self) -> None:
        self.module = nn.Linear(1, 3, bias=False).requires_grad_(False)
        self.count = 0

    def __call__(self, waveform: Tensor) -> Tensor:
        self.count += 1
        encoded: Tensor = self.module(waveform[:, None])
        return encoded


def test_a_clip_is_encoded_once_and_is_the_same_the_second_time() -> None:
    encoder = Calls()
    clips = EncodedClips(encoder.module)
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0, 0.0])
    made = clips.encoded(first, encoder)
    other = clips.encoded(second, encoder)
    assert torch.equal(clips.encoded(first.clone(), encoder), made)
    assert torch.equal(clips.encoded(second, encoder), other)
    assert other.shape == (3, 3)  # silence at the end is part of a clip
    assert encoder.count == 2


def test_loaded_weights_are_noticed() -> None:
    encoder = Calls()
    clips = EncodedClips(encoder.module)
    waveform = torch.tensor([1.0, 2.0])
    before = clips.encoded(waveform, encoder)
    encoder.module.load_state_dict({"weight": torch.tensor([[1.0], [2.0], [3.0]])})
    after = clips.encoded(waveform, encoder)
    assert after.tolist() == [[1, 2, 3], [2, 4, 6]]
    assert not torch.equal(before, after)


def test_the_clip_that_was_not_asked_for_longest_goes_first() -> None:
    encoder = Calls()
    clips = EncodedClips(encoder.module, limit=2 * 3 * 4)  # two clips of one frame of three float32
    one, two, three = (torch.tensor([float(value)]) for value in (1, 2, 3))
    clips.encoded(one, encoder)
    clips.encoded(two, encoder)
    clips.encoded(one, encoder)
    clips.encoded(three, encoder)
    assert encoder.count == 3
    clips.encoded(one, encoder)
    assert encoder.count == 3
    clips.encoded(two, encoder)
    assert encoder.count == 4


def test_an_encoder_that_learns_is_not_kept() -> None:
    encoder = Calls()
    assert EncodedClips(encoder.module).frozen
    encoder.module.requires_grad_(True)
    assert not EncodedClips(encoder.module).frozen
