"""Which of Hugging Face's tensors make up which of ours: tables of names and layout rules, used both ways."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from nemo_mapo.config.model import DecoderConfig
from nemo_mapo.models.hf.layouts import GateUp, Layout, QueryKeyValue, Same

Kind = Literal["same", "gate_up", "query_key_value"]


class Rule(NamedTuple):
    """A line of a table; {layer} and {expert} are numbers, {name} is any text, the same on both sides."""

    ours: str
    theirs: tuple[str, ...]
    kind: Kind = "same"


_LAYER, _THEIR_LAYER = "language_model.decoder.layers.{layer}.", "model.layers.{layer}."
_ATTENTION, _THEIR_ATTENTION = _LAYER + "self_attention.", _THEIR_LAYER + "self_attn."
_EXPERT, _THEIR_EXPERT = _LAYER + "mlp.experts.local_experts.{expert}.", _THEIR_LAYER + "mlp.experts.{expert}."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

DECODER_RULES = (
    Rule("language_model.embedding.word_embeddings.weight", (EMBEDDING,)),
    Rule("language_model.decoder.final_layernorm.weight", ("model.norm.weight",)),
    # A tied head is not in our state.
    Rule("language_model.output_layer.weight", (HEAD,)),
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
"""Decoders of the Llama kind: Llama, Qwen2, Qwen3 dense and with experts, and the Qwen Omni thinkers."""

_BUFFER = re.compile(r"(.+\.)?rotary_emb\.inv_freq")
"""Rotary frequencies, which older files store although config.json determines them."""
_FIELDS = {"layer": r"\d+", "expert": r"\d+", "name": r".+"}


class Source(NamedTuple):
    """Where one of our tensors comes from."""

    theirs: tuple[str, ...]
    layout: Layout


class WeightMap:
    """The tables for one model.

    Args:
        decoder: the heads of its attention, and whether its head is tied.
        rules: tables besides the decoder's, such as an encoder's.
        prefix: prefix of all of their names, such as `thinker.`.
        left_aside: parts that are deliberately not imported, by the prefix of their names.
        decoder_rules: the decoder's table.
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        *,
        rules: Sequence[Rule] = (),
        prefix: str = "",
        left_aside: Mapping[str, str] | None = None,
        decoder_rules: Sequence[Rule] = DECODER_RULES,
    ) -> None:
        self.prefix = prefix
        self.rules = (*decoder_rules, *rules)
        self._left_aside = tuple(left_aside or {})
        self._tied = decoder.share_embeddings_and_output_weights
        heads_per_group = decoder.num_attention_heads // decoder.num_query_groups
        self._layouts: dict[Kind, Layout] = {
            "same": Same(),
            "gate_up": GateUp(),
            "query_key_value": QueryKeyValue(groups=decoder.num_query_groups, heads_per_group=heads_per_group),
        }

    def source(self, ours: str) -> Source:
        """Their tensors that make up one of ours; ValueError if no rule covers the name."""
        for rule in self.rules:
            match = _pattern(rule.ours).fullmatch(ours)
            if match:
                theirs = tuple(self.prefix + name.format(**match.groupdict()) for name in rule.theirs)
                return Source(theirs, self._layouts[rule.kind])
        raise ValueError(f"no rule of nemo_mapo/models/hf/weights.py covers our tensor {ours}")

    def sources(self, ours: Iterable[str], theirs: Iterable[str]) -> dict[str, Source]:
        """The source of each of our tensors.

        Raises:
            ValueError: naming tensors of theirs that are missing, or that are neither mapped nor left aside.
        """
        sources = {name: self.source(name) for name in ours}
        wanted = {name for source in sources.values() for name in source.theirs}
        given = {name for name in theirs if not self.is_left_aside(name)} - self.copies().keys()
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

    def is_left_aside(self, theirs: str) -> bool:
        """Whether a tensor of theirs is deliberately not imported; export carries it over."""
        return theirs.startswith(self._left_aside) or _BUFFER.fullmatch(theirs) is not None

    def copies(self) -> dict[str, str]:
        """Tensors that files may hold a second time, and the name of the first: a tied head beside the embedding."""
        return {self.prefix + HEAD: self.prefix + EMBEDDING} if self._tied else {}


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    named = [f"(?P<{part}>{_FIELDS[part]})" if index % 2 else re.escape(part) for index, part in enumerate(parts)]
    return re.compile("".join(named))


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
