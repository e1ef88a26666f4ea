"""nemo-mapo: GRPO for audio language models that keeps the model listening (MAPO, arXiv 2605.27741)."""

__version__ = "0.1.0"
