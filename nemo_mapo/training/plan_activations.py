"""Memory that one micro-batch keeps for its backward pass, in closed form; docs/planner.md derives the terms."""

import math
from dataclasses import dataclass

from nemo_mapo.attention.mass import EXPLICIT_MASK_QUERIES, HEAD_WIDTH_MULTIPLE
from nemo_mapo.attention.te_support import MASS_WIDTH
from nemo_mapo.config.model import ConvPerceptionConfig, ModelConfig
from nemo_mapo.training.signals import LOGIT_CHUNK_ELEMENTS
from nemo_mapo.upstream.megatron import SWIGLU_KEEPS

_FLOAT = 4
_INDEX = 8


@dataclass(frozen=True, kw_only=True)
class SharedPrompts:
    """Completions of equal length whose prompts, also of equal length, are computed once: `attention.shared`."""

    groups: int
    """Prompts of the micro-batch, or parts of groups."""
    completions: int
    prompt: int
    """Tokens of a prompt that its completions share."""
    completion: int

    @property
    def own_tokens(self) -> int:
        """Positions of completions, at which logits are read."""
        return self.completions * self.completion

    @property
    def tokens(self) -> int:
        """Positions that are read."""
        return self.groups * self.prompt + self.own_tokens

    def query_blocks(self) -> list[tuple[int, int]]:
        """Queries of a completion that attend together, and the keys that the last of them sees."""
        starts = range(0, self.completion, EXPLICIT_MASK_QUERIES)
        ends = [min(start + EXPLICIT_MASK_QUERIES, self.completion) for start in starts]
        return [(end - start, self.prompt + end) for start, end in zip(starts, ends, strict=True)]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What determines activations besides the model."""

    tokens: int
    """Rows x tokens of a row, padding included; of a packed row its token budget."""
    clips: int
    """Distinct audio clips."""
    audio_seconds: float
    """Length of a clip."""
    vocab_size: int
    """Padded to a multiple of the tensor-parallel ranks."""
    width: int
    """Bytes of an element: 4 (fp32) or 2 (bf16)."""
    measures_mass: bool
    """Whether target layers report their audio mass."""
    shared: SharedPrompts | None = None
    """How `tokens` come about where prompts are shared."""
    cuda: bool
    """A GPU's fused norms keep their input in the model's precision; a CPU's keep it and the result in float32."""


def layer_bytes(model: ModelConfig, batch: MicroBatch, *, target: bool) -> int:
    """One decoder layer without recompute, of one tensor-parallel rank."""
    attention = (
        _norm(model, batch) + _linear_input(model, batch, "linear_qkv") + _attention(model, batch, target=target)
    )
    return attention + _feed_forward(model, batch)


def stage_bytes(model: ModelConfig, batch: MicroBatch, stage: int) -> int:
    """All layers of a pipeline stage, for one micro-batch, with recompute; the last stage's final norm included."""
    stages = model.pipeline_model_parallel_size
    per_stage = model.decoder.num_layers // stages
    layers = range(stage * per_stage, (stage + 1) * per_stage)
    recomputed = 0
    if model.decoder.recompute_granularity == "full":
        recomputed = model.recomputed_layers_per_stage[stage]
    total = recomputed * _whole_layer_input(model, batch)
    for layer in layers[recomputed:]:
        target = batch.measures_mass and layer in model.resolved_target_layers
        total += layer_bytes(model, batch, target=target) - _dropped(model, batch, layer)
    if stage == stages - 1:
        read = _share(model, batch.tokens) if model.sequence_parallel else _read(model, batch)
        total += _norm(model, batch) + read * model.decoder.hidden_size * batch.width
    return total


def recompute_bytes(model: ModelConfig, batch: MicroBatch, stage: int) -> int:
    """Temporary memory for running a recomputed layer again, if no other layer's activations are larger."""
    if model.decoder.recompute_granularity != "full":
        return 0
    kept = model.decoder.num_layers // model.pipeline_model_parallel_size - model.recomputed_layers_per_stage[stage]
    return 0 if kept else layer_bytes(model, batch, target=False)


def perception_bytes(model: ModelConfig, batch: MicroBatch) -> int | None:
    """The audio encoder; None for a trained one of a kind without a formula."""
    freeze = model.resolved_freeze
    if freeze.perception and freeze.projector:
        return 0
    if not isinstance(model.perception, ConvPerceptionConfig):
        return None
    encoder = model.perception
    frames = [round(batch.audio_seconds / encoder.hop_seconds)]
    while 2 ** (len(frames) - 1) < encoder.downsampling:
        frames.append((frames[-1] + 1) // 2)
    # Each convolution keeps its input and that of its GELU; norm and projection keep theirs.
    elements = 0 if freeze.projector else 2 * encoder.channels * frames[-1]
    if not freeze.perception:
        halved = sum(2 * encoder.channels * count for count in frames[1:])
        elements += encoder.mel_bins * frames[0] + halved + encoder.channels * frames[-1]
    return batch.clips * elements * batch.width


def logits_bytes(model: ModelConfig, batch: MicroBatch) -> tuple[int, int]:
    """Logits that are kept; their gradient and the float32 workspace, which the backward pass adds."""
    kept = _read(model, batch) * batch.vocab_size // model.tensor_model_parallel_size * batch.width
    chunk = LOGIT_CHUNK_ELEMENTS["cuda" if batch.cuda else "cpu"] * _FLOAT
    return kept, kept + min(chunk, kept * _FLOAT // batch.width)


def kv_cache_bytes(model: ModelConfig, *, rows: int, tokens: int, width: int) -> int:
    """Keys and values of one pipeline stage's layers for rows of so many tokens."""
    decoder = model.decoder
    heads = decoder.num_query_groups // model.tensor_model_parallel_size
    layers = decoder.num_layers // model.pipeline_model_parallel_size
    return 2 * rows * tokens * layers * heads * decoder.kv_channels * width


def _read(model: ModelConfig, batch: MicroBatch) -> int:
    """Positions whose logits are computed; ranks of a sharded sequence compute all of them."""
    return batch.tokens if batch.shared is None or model.sequence_parallel else batch.shared.own_tokens


def _share(model: ModelConfig, tokens: int) -> int:
    """Tokens of which a rank holds the residual stream."""
    return tokens // model.tensor_model_parallel_size if model.sequence_parallel else tokens


def _decoder_frozen(model: ModelConfig) -> bool:
    return model.lora is not None or model.resolved_freeze.decoder


def _norm(model: ModelConfig, batch: MicroBatch) -> int:
    """RMSNorm over the hidden width: its input, the root's inverse, and on a CPU the result before the gain."""
    return _norm_rows(model, batch, _share(model, batch.tokens), model.decoder.hidden_size)


def _norm_rows(model: ModelConfig, batch: MicroBatch, rows: int, features: int) -> int:
    if batch.cuda:
        return rows * (features * batch.width + _FLOAT)
    return rows * ((1 if _decoder_frozen(model) else 2) * features * _FLOAT + _FLOAT)


def _linear_input(model: ModelConfig, batch: MicroBatch, name: str, features: int | None = None) -> int:
    """Input of a linear (of the hidden width, shared by position, or of `features`), which its weight's gradient needs.

    A frozen linear needs none, unless it has an adapter; that keeps its inner activations too.
    """
    adapter = model.lora is not None and name in model.lora.targets
    if _decoder_frozen(model) and not adapter:
        return 0
    rows = _share(model, batch.tokens) if features is None else batch.tokens
    elements = rows * (model.decoder.hidden_size if features is None else features)
    if model.lora is not None and adapter:
        elements += batch.tokens * model.lora.rank
    return elements * batch.width


def _attention(model: ModelConfig, batch: MicroBatch, *, target: bool) -> int:
    """From the projected queries, keys and values to the input of the output projection."""
    decoder, shards = model.decoder, model.tensor_model_parallel_size
    tokens, dim = batch.tokens, decoder.kv_channels
    heads, groups = decoder.num_attention_heads // shards, decoder.num_query_groups // shards
    total = tokens * (heads + 2 * groups) * dim * batch.width
    if decoder.qk_layernorm:
        total += _norm_rows(model, batch, tokens * heads, dim) + _norm_rows(model, batch, tokens * groups, dim)
        # The keys' norm reads them where they were projected to, unless it has to widen them first.
        if batch.cuda or batch.width == _FLOAT:
            total -= tokens * groups * dim * batch.width
    statistics = tokens * heads * _FLOAT
    rotated = tokens * (heads + groups) * dim * batch.width
    output = tokens * heads * dim * batch.width
    if batch.shared is not None:
        # The projection's input is put together from the prompts' output and the completions'.
        # Rotations differ from token to token, and each of queries and keys keeps sine and cosine.
        rotations = 4 * tokens * dim * batch.width
        own = _completions_attention(model, batch.shared, batch.width, target=target)
        return total + rotations + rotated + statistics + output + own
    if not target:
        return total + rotated + statistics + output
    if model.attention_backend == "transformer_engine":
        measuring = tokens * (heads + groups) * MASS_WIDTH * batch.width + statistics
        return total + rotated + statistics + output + measuring
    wide = math.ceil((dim + 1) / HEAD_WIDTH_MULTIPLE) * HEAD_WIDTH_MULTIPLE
    widened = tokens * 2 * (heads + groups) * wide * batch.width
    projected = _linear_input(model, batch, "linear_proj", heads * dim)
    return total + widened + statistics + projected


def _completions_attention(model: ModelConfig, shared: SharedPrompts, width: int, *, target: bool) -> int:
    """What attention saves besides its input, output and statistics if completions see [prompt keys | own keys]."""
    shards, dim = model.tensor_model_parallel_size, model.decoder.kv_channels
    heads, groups = model.decoder.num_attention_heads // shards, model.decoder.num_query_groups // shards
    wide = math.ceil((dim + 1) / HEAD_WIDTH_MULTIPLE) * HEAD_WIDTH_MULTIPLE if target else dim
    blocks = shared.query_blocks()
    # Without channels for the mass the blocks are views of one copy.
    keys = sum(last for _, last in blocks) if target else shared.prompt + shared.completion
    copies = shared.own_tokens * heads * wide + shared.completions * keys * 2 * groups * wide
    outputs = shared.groups * shared.prompt * heads * dim + shared.own_tokens * heads * wide
    masks = shared.groups * sum(queries * last for queries, last in blocks)
    return (copies + outputs + masks) * width + 2 * shared.own_tokens * _INDEX


def _feed_forward(model: ModelConfig, batch: MicroBatch) -> int:
    """Norm and SwiGLU, or norm, router and the experts that the tokens visit, balanced over ranks."""
    decoder, shards = model.decoder, model.tensor_model_parallel_size
    total = _norm(model, batch) + _linear_input(model, batch, "linear_fc1")
    if decoder.num_moe_experts is None:
        inner = decoder.ffn_hidden_size // shards
        total += SWIGLU_KEEPS * batch.tokens * inner * batch.width
        return total + _linear_input(model, batch, "linear_fc2", inner)
    return total + _experts(model, batch)


def _experts(model: ModelConfig, batch: MicroBatch) -> int:
    decoder = model.decoder
    assert decoder.num_moe_experts is not None
    inner = decoder.moe_ffn_hidden_size // model.tensor_model_parallel_size
    local = _share(model, batch.tokens)
    routing = local * (decoder.moe_router_topk * (2 * _INDEX + _FLOAT) + decoder.num_moe_experts * (1 + _FLOAT))
    visits = batch.tokens * decoder.moe_router_topk
    # The router and the experts of frozen decoders keep no inputs.
    inputs = 0 if _decoder_frozen(model) else visits * (decoder.hidden_size + inner)
    return routing + visits * _FLOAT + (inputs + visits * 4 * inner) * batch.width


def _whole_layer_input(model: ModelConfig, batch: MicroBatch) -> int:
    return _share(model, batch.tokens) * model.decoder.hidden_size * batch.width


def _dropped(model: ModelConfig, batch: MicroBatch, layer: int) -> int:
    """What selective recompute drops of a layer."""
    decoder = model.decoder
    if decoder.recompute_granularity != "selective":
        return 0
    modules = set(decoder.recompute_modules)
    dropped = 0
    if "core_attn" in modules and layer not in model.resolved_target_layers:
        dropped += batch.tokens * decoder.num_attention_heads // model.tensor_model_parallel_size * _FLOAT
        if batch.shared is not None:
            dropped += _completions_attention(model, batch.shared, batch.width, target=False)
    inside = _feed_forward(model, batch) - _norm(model, batch) - _linear_input(model, batch, "linear_fc1")
    if modules & {"mlp"} and decoder.num_moe_experts is None:
        dropped += inside
    if modules & {"moe"} and decoder.num_moe_experts is not None:
        dropped += inside
    if "layernorm" in modules:
        dropped += _linear_input(model, batch, "linear_qkv") + _linear_input(model, batch, "linear_fc1")
    return dropped
