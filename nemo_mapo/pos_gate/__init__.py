"""From the words of a completion to the tokens that the attention loss steers."""

from nemo_mapo.pos_gate.gate import pos_token_gate

__all__ = ["pos_token_gate"]
