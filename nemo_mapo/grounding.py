"""Earlier name of `nemo_mapo.pos_gate`; the grounding analysis is `nemo_mapo.evaluation.grounding`."""

from nemo_mapo.pos_gate import pos_token_gate

__all__ = ["pos_token_gate"]
