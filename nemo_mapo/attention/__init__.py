"""Audio attention mass: exact, fused and differentiable, and its slow reference."""

from nemo_mapo.attention.dense import dense_audio_attention_mass
from nemo_mapo.attention.mass import audio_attention_mass

__all__ = ["audio_attention_mass", "dense_audio_attention_mass"]
