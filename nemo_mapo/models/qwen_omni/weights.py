"""Which of Hugging Face's tensors make up which of ours: one table, used both ways."""

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from nemo_mapo.config.model import DecoderConfig
from nemo_mapo.models.qwen_omni.layouts import GateUp, Layout, QueryKeyValue, Same

Kind = Literal["same", "gate_up", "query_key_value"]


class Rule(NamedTuple):
    """A line of the table; {layer} and {expert} are numbers, {name} is any rest, the same on both sides."""

    ours: str
    theirs: tuple[str, ...]
    kind: Kind = "same"


_LAYER, _THEIR_LAYER = "language_model.decoder.layers.{layer}.", "model.layers.{layer}."
_ATTENTION, _THEIR_ATTENTION = _LAYER + "self_attention.", _THEIR_LAYER + "self_attn."
_EXPERT, _THEIR_EXPERT = _LAYER + "mlp.experts.local_experts.{expert}.", _THEIR_LAYER + "mlp.experts.{expert}."

RULES = (
    Rule("perception.module.{name}", ("audio_tower.{name}",)),
    Rule("language_model.embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    Rule("language_model.decoder.final_layernorm.weight", ("model.norm.weight",)),
    # A tied head is not in either state.
    Rule("language_model.output_layer.weight", ("lm_head.weight",)),
    Rule(_LAYER + "input_layernorm.weight", (_THEIR_LAYER + "input_layernorm.weight",)),
    Rule(_LAYER + "pre_mlp_layernorm.weight", (_THEIR_LAYER + "post_attention_layernorm.weight",)),
    Rule(
        _ATTENTION + "linear_qkv.weight",
        tuple(f"{_THEIR_ATTENTION}{part}_proj.weight" for part in "qkv"),
        "query_key_value",
    ),
    Rule(
        _ATTENTION + "linear_qkv.bias",
        tuple(f"{_THEIR_ATTENTION}{part}_proj.bias" for part in "qkv"),
        "query_key_value",
    ),
    Rule(_ATTENTION + "q_layernorm.weight", (_THEIR_ATTENTION + "q_norm.weight",)),
    Rule(_ATTENTION + "k_layernorm.weight", (_THEIR_ATTENTION + "k_norm.weight",)),
    Rule(_ATTENTION + "linear_proj.weight", (_THEIR_ATTENTION + "o_proj.weight",)),
    Rule(
        _LAYER + "mlp.linear_fc1.weight",
        (_THEIR_LAYER + "mlp.gate_proj.weight", _THEIR_LAYER + "mlp.up_proj.weight"),
        "gate_up",
    ),
    Rule(_LAYER + "mlp.linear_fc2.weight", (_THEIR_LAYER + "mlp.down_proj.weight",)),
    Rule(_LAYER + "mlp.router.weight", (_THEIR_LAYER + "mlp.gate.weight",)),
    Rule(
        _EXPERT + "linear_fc1.weight", (_THEIR_EXPERT + "gate_proj.weight", _THEIR_EXPERT + "up_proj.weight"), "gate_up"
    ),
    Rule(_EXPERT + "linear_fc2.weight", (_THEIR_EXPERT + "down_proj.weight",)),
)
"""Names of the thinker; in a whole model's files `thinker.` stands before theirs."""

LEFT_ASIDE = {
    "talker.": "speaks",
    "token2wav.": "speaks (Qwen2.5)",
    "code2wav.": "speaks (Qwen3)",
    "thinker.visual.": "sees",
    "visual.": "sees (files of a thinker alone)",
}
"""What an audio LLM that answers in text has no use for, by prefix; carried over on export."""

_FIELDS = {"layer": r"\d+", "expert": r"\d+", "name": r".+"}


class Source(NamedTuple):
    """Where one of our tensors comes from."""

    theirs: tuple[str, ...]
    layout: Layout


class WeightMap:
    """The table for one model: `prefix` before their names, and the heads of its attention."""

    def __init__(self, decoder: DecoderConfig, *, prefix: str) -> None:
        self.prefix = prefix
        heads_per_group = decoder.num_attention_heads // decoder.num_query_groups
        self._layouts: dict[Kind, Layout] = {
            "same": Same(),
            "gate_up": GateUp(),
            "query_key_value": QueryKeyValue(groups=decoder.num_query_groups, heads_per_group=heads_per_group),
        }

    def source(self, ours: str) -> Source:
        """Their tensors that make up one of ours; ValueError for a name that no rule covers."""
        for rule in RULES:
            match = _pattern(rule.ours).fullmatch(ours)
            if match:
                theirs = tuple(self.prefix + name.format(**match.groupdict()) for name in rule.theirs)
                return Source(theirs, self._layouts[rule.kind])
        raise ValueError(f"no rule of nemo_mapo/models/qwen_omni/weights.py covers our tensor {ours}")

    def sources(self, ours: Iterable[str], theirs: Iterable[str]) -> dict[str, Source]:
        """The source of each of our tensors.

        Raises:
            ValueError: naming tensors of theirs that are missing, or that are neither mapped nor left aside.
        """
        sources = {name: self.source(name) for name in ours}
        wanted = {name for source in sources.values() for name in source.theirs}
        given = {name for name in theirs if not is_left_aside(name)}
        problems = [
            f"{len(names)} {what}: {_some(names)}"
            for what, names in (
                ("missing from the files", sorted(wanted - given)),
                ("in the files, and neither mapped nor left aside", sorted(given - wanted)),
            )
            if names
        ]
        if problems:
            raise ValueError("tensors do not match the model that config.json describes: " + "; ".join(problems))
        return sources


def is_left_aside(theirs: str) -> bool:
    """Whether a tensor of theirs belongs to a part that is deliberately not taken in."""
    return theirs.startswith(tuple(LEFT_ASIDE))


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    named = [f"(?P<{part}>{_FIELDS[part]})" if index % 2 else re.escape(part) for index, part in enumerate(parts)]
    return re.compile("".join(named))


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
