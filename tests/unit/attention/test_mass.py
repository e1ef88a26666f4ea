"""What the audio attention mass means, on cases small enough to work out by hand."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_mapo.attention import audio_attention_mass, dense_audio_attention_mass
from nemo_mapo.attention.mass import attention_with_audio_mass, attention_without_mass

REPOSITORY = Path(__file__).parents[3]
BOTH_WAYS = pytest.mark.parametrize("mass_of", [audio_attention_mass, dense_audio_attention_mass])


def one_head(*rows: list[float]) -> torch.Tensor:
    """`[batch=1, time, heads=1, dim]` in float64."""
    return torch.tensor(rows, dtype=torch.float64)[None, :, None, :]


def random_attention(
    batch: int = 2, time_q: int = 12, time_k: int = 12, heads: int = 4, kv_heads: int = 2, dim: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, time_q, heads, dim, generator=generator)
    key = torch.randn(batch, time_k, kv_heads, dim, generator=generator)
    value = torch.randn(batch, time_k, kv_heads, dim, generator=generator)
    return query, key, value


@BOTH_WAYS
def test_three_tokens_by_hand(mass_of) -> None:
    """Keys 0, ln 2, ln 4 against query 1 weigh 1 : 2 : 4; the middle key is audio."""
    query = one_head([1.0], [1.0], [1.0])
    key = one_head([0.0], [math.log(2)], [math.log(4)])
    audio = torch.tensor([[False, True, False]])
    mass = mass_of(query, key, audio, softmax_scale=1.0)
    torch.testing.assert_close(mass, torch.tensor([[[0.0, 2 / 3, 2 / 7]]], dtype=torch.float64))


@BOTH_WAYS
def test_the_scale_defaults_to_the_root_of_the_real_head_width(mass_of) -> None:
    """Width 4 halves the logit 2 ln 3, so the keys weigh 1 : 3 whatever columns the kernel adds."""
    query = one_head([0, 0, 0, 0], [2 * math.log(3), 0, 0, 0])
    key = one_head([0, 0, 0, 0], [1, 0, 0, 0])
    audio = torch.tensor([[False, True]])
    for segment_ids in (None, torch.tensor([[3, 3]])):
        mass = mass_of(query, key, audio, segment_ids=segment_ids)
        torch.testing.assert_close(mass[0, 0, 1], torch.tensor(0.75, dtype=torch.float64))


@BOTH_WAYS
def test_each_query_head_reads_the_key_head_of_its_group(mass_of) -> None:
    query = torch.ones(1, 2, 4, 1, dtype=torch.float64)
    key = torch.zeros(1, 2, 2, 1, dtype=torch.float64)
    key[0, 1, 1] = math.log(9)
    audio = torch.tensor([[False, True]])
    mass = mass_of(query, key, audio, softmax_scale=1.0)
    torch.testing.assert_close(mass[0, :, 1], torch.tensor([0.5, 0.5, 0.9, 0.9], dtype=torch.float64))


def test_all_keys_audio_gives_one_and_none_gives_zero() -> None:
    query, key, _ = random_attention()
    everything = torch.ones(2, 12, dtype=torch.bool)
    torch.testing.assert_close(audio_attention_mass(query, key, everything), torch.ones(2, 4, 12))
    assert audio_attention_mass(query, key, ~everything).abs().max() == 0


def test_a_planted_future_audio_token_is_never_counted() -> None:
    """The last key shouts at every query and is audio: only the last query may hear it."""
    query, key, _ = random_attention(heads=2)
    query[..., 0], key[:, -1, :, 0] = 10.0, 10.0
    audio = torch.zeros(2, 12, dtype=torch.bool)
    audio[:, -1] = True
    mass = audio_attention_mass(query, key, audio)
    assert mass[..., :-1].abs().max() == 0
    assert mass[..., -1].min() > 0.99
    assert audio_attention_mass(query, key, audio, causal=False).min() > 0.99


@pytest.mark.parametrize(
    "segment_ids", [[1, 1, 1, 2, 2, 2], [5, 5, 5, 0, 0, 0], [0, 0, 0, 1, 1, 1], [7, 7, 7, 8, 8, 8]]
)
def test_a_planted_audio_token_of_another_segment_is_never_counted(segment_ids: list[int]) -> None:
    query, key, _ = random_attention(batch=1, time_q=6, time_k=6)
    query[..., 0], key[:, 1, :, 0] = 30.0, 30.0
    audio = torch.zeros(1, 6, dtype=torch.bool)
    audio[:, 1] = True
    mass = audio_attention_mass(query, key, audio, segment_ids=torch.tensor([segment_ids]))
    assert mass[..., 1:3].min() > 0.99
    assert mass[..., 3:].abs().max() == 0


def test_many_packed_segments_equal_the_separate_samples() -> None:
    """Forty samples of two tokens in one row, under ids that need six bits, mean what each means alone."""
    query, key, _ = random_attention(batch=1, time_q=80, time_k=80)
    audio = torch.zeros(1, 80, dtype=torch.bool)
    audio[:, ::2] = True
    segment_ids = torch.arange(1, 41).repeat_interleave(2)[None]
    packed = audio_attention_mass(query, key, audio, segment_ids=segment_ids)
    alone = audio_attention_mass(*(tensor.reshape(40, 2, *tensor.shape[2:]) for tensor in (query, key, audio)))
    torch.testing.assert_close(packed, alone.permute(1, 0, 2).reshape(1, 4, 80))


def test_no_query_sees_padding_and_its_rows_are_finite() -> None:
    query, key, value = random_attention(batch=1)
    audio = torch.zeros(1, 12, dtype=torch.bool)
    audio[:, 4:7] = True
    segment_ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]])
    output, mass = attention_with_audio_mass(query, key, value, audio, segment_ids=segment_ids)
    poisoned = [torch.where((segment_ids == 0)[..., None, None], 50.0, tensor) for tensor in (key, value)]
    output_poisoned, mass_poisoned = attention_with_audio_mass(query, *poisoned, audio, segment_ids=segment_ids)
    assert torch.isfinite(mass).all() and torch.isfinite(output).all()
    assert torch.equal(mass[..., 3:9], mass_poisoned[..., 3:9])
    assert torch.equal(output[:, 3:9], output_poisoned[:, 3:9])


def test_the_output_beside_the_mass_is_plain_attention() -> None:
    query, key, value = random_attention()
    audio = torch.rand(2, 12) < 0.4
    for segment_ids in (None, torch.tensor([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])):
        output, _ = attention_with_audio_mass(query, key, value, audio, segment_ids=segment_ids)
        plain = attention_without_mass(query, key, value, segment_ids=segment_ids)
        torch.testing.assert_close(output, plain, atol=1e-6, rtol=1e-5)


def test_a_value_width_other_than_the_key_width_is_allowed() -> None:
    query, key, value = random_attention()
    wide = torch.cat((value, value), dim=-1)
    output, mass = attention_with_audio_mass(query, key, wide, torch.ones(2, 12, dtype=torch.bool))
    assert output.shape == (2, 12, 4, 16) and mass.shape == (2, 4, 12)
    torch.testing.assert_close(output[..., :8], output[..., 8:])


MISFITS = {
    # Added to scores, ones would raise audio logits by 1 instead of selecting audio.
    "audio.float()": "audio_key_mask must be bool, got torch.float32",
    "audio[:, 1:]": "audio_key_mask has shape (2, 11), keys are (2, 12)",
    "audio, segment_ids=audio": "segment_ids must be integers, got torch.bool",
    "audio, segment_ids=segments[:1]": "segment_ids have shape (1, 12), keys are (2, 12)",
}
PROGRAM = """
import sys, torch
from nemo_mapo.attention import audio_attention_mass
query = key = torch.zeros(2, 12, 2, 8)
audio, segments = torch.ones(2, 12, dtype=torch.bool), torch.ones(2, 12, dtype=torch.long)
for arguments in sys.argv[1:]:
    try:
        eval(f"audio_attention_mass(query, key, {arguments})")
    except ValueError as error:
        print(error)
"""


def test_masks_that_do_not_fit_are_refused() -> None:
    """In a user's program: in this suite the shape checker objects before our own code does."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *MISFITS], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert ran.stdout.splitlines() == list(MISFITS.values())


def test_impossible_arguments_say_what_is_wrong() -> None:
    query, key, _ = random_attention()
    audio = torch.ones(2, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match="segment_ids must be >= 0"):
        audio_attention_mass(query, key, audio, segment_ids=torch.full((2, 12), -1))
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        audio_attention_mass(query[:, :, :3], key, audio)
    with pytest.raises(ValueError, match="12 queries for 5 keys"):
        audio_attention_mass(query, key[:, :5], audio[:, :5])
