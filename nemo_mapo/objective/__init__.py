"""The MAPO objective: pure tensor maths, `[batch, time]` tensors in, one scalar and its metrics out."""

from nemo_mapo.objective.advantages import group_advantages
from nemo_mapo.objective.attention_loss import attention_prefactor
from nemo_mapo.objective.mapo import mapo_loss
from nemo_mapo.objective.masks import inverse_relevance, relevance_mask
from nemo_mapo.objective.temporal import temporal_weight

__all__ = [
    "attention_prefactor",
    "group_advantages",
    "inverse_relevance",
    "mapo_loss",
    "relevance_mask",
    "temporal_weight",
]
