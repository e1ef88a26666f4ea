"""What the files of a Qwen Omni thinker hold besides its decoder."""

from nemo_mapo.models.hf.weights import Rule

ENCODER_RULES = (Rule("perception.module.{name}", ("audio_tower.{name}",)),)

LEFT_ASIDE = {
    "talker.": "speaks",
    "token2wav.": "speaks (Qwen2.5)",
    "code2wav.": "speaks (Qwen3)",
    "thinker.visual.": "sees",
    "visual.": "sees (files of a thinker alone)",
}
"""What an audio LLM that answers in text has no use for, by prefix; carried over on export."""
