"""Tiny Qwen Omni models with random weights, as Hugging Face directories, and what transformers computes with them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5OmniForConditionalGeneration,
    Qwen3OmniMoeForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniConfig
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeConfig
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import _get_feat_extract_output_lengths

from nemo_mapo.data.tokenizer import AUDIO, AUDIO_END, AUDIO_START, SPECIAL_TOKENS, USER, SpecialTokens
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.hf.convert import CHECKPOINT, ORIGINAL
from nemo_mapo.models.hf.models import read_model
from nemo_mapo.models.layout import audio_of, padded
from nemo_mapo.models.pipeline import forward_all_stages
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.rows import Prompt
from nemo_mapo.training.build import build_audio_llm
from nemo_mapo.training.checkpoint import load_checkpoint, load_part
from nemo_mapo.types import AudioBatch
from support.tiny import CONTROL_TOKENS, tiny_tokenizer

Family = Literal["qwen2_5_omni", "qwen3_omni_moe"]
FAMILIES: tuple[Family, ...] = ("qwen2_5_omni", "qwen3_omni_moe")
SAMPLE_RATE, HOP = 16000, 160
FIRST_WORD = len(CONTROL_TOKENS)
VOCAB_SIZE = 61
"""More than the tokenizer has, and odd: two ranks cannot share it out without padding."""
NUM_LAYERS, NUM_EXPERTS = 3, 4
WINDOW_SECONDS = 2
"""Of the tiny encoders: clips longer than this are attended to in parts."""
SPREAD = 0.25
"""Of the random weights: logits far enough apart that rounding does not decide an argmax."""
Row = tuple[list[int], list[Tensor]]
"""Ids of a prompt and its clips, in order."""
TALKER = {"talker.model.embed.weight": (3, 5), "code2wav.decoder.weight": (7,), "token2wav.dit.weight": (2, 2)}


@dataclass(frozen=True, kw_only=True)
class TinyHf:
    """A saved model."""

    family: str
    directory: Path
    thinker: PreTrainedModel


def save_tiny(
    directory: Path,
    family: Family,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **text: Any,
) -> TinyHf:
    """Make a model of the whole class, without talker, and save it in several shards with what belongs to it."""
    tokenizer = tokenizer or tiny_tokenizer()
    whole = _whole_model(family, SpecialTokens.from_tokenizer(tokenizer), text)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in whole.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * SPREAD
        parameter.data = (1 + drawn if "norm" in name or "ln_" in name else drawn).to(dtype)
    whole.save_pretrained(directory, max_shard_size="60KB")
    _add_talker(directory)
    # Qwen2.5's class does not load without it.
    torch.save({}, directory / "spk_dict.pt")
    tokenizer.save_pretrained(str(directory))
    WhisperFeatureExtractor(feature_size=16, chunk_length=30).save_pretrained(directory)
    return TinyHf(family=family, directory=directory, thinker=whole.thinker.eval())


def qwen_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """The tokenizer of the synthetic corpus with Qwen's special tokens and a chat template in the manner of Qwen's."""
    pad, end, audio, start, stop = names = SPECIAL_TOKENS[family]
    # Renamed in place: with ours beside them it would be read as a tokenizer of our own family.
    text = build_tokenizer().backend_tokenizer.to_str().replace(USER, "<|im_start|>")
    for ours, name in zip(SPECIAL_TOKENS["nemo_mapo"], names, strict=True):
        text = text.replace(json.dumps(ours), json.dumps(name))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        pad_token=pad,
        eos_token=end,
        additional_special_tokens=[audio, start, stop, "<|im_start|>"],
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
        "{% if part.type == 'audio' %}"
        + start
        + audio
        + stop
        + "{% else %}{{ part.text }}{% endif %}{% endfor %}"
        + end
        + "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def clip(samples: int, *, seed: int = 0) -> Tensor:
    """Noise."""
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * 0.3


def row(family: Family, *parts: int | Tensor, seed: int = 0) -> Row:
    """A prompt of words (a number of them) and clips, in order."""
    vocabulary = tiny_tokenizer().get_vocab()
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    clips: list[Tensor] = []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(FIRST_WORD, len(vocabulary), (part,), generator=generator).tolist()
        else:
            ids += [vocabulary[AUDIO_START], *[vocabulary[AUDIO]] * audio_tokens(family, len(part))]
            ids.append(vocabulary[AUDIO_END])
            clips.append(part)
    return ids, clips


def audio_tokens(family: Family, samples: int) -> int:
    """Placeholders of a clip, counted as transformers' processors do it."""
    if family == "qwen2_5_omni":
        frames = -(-samples // HOP)
        return (((frames - 1) // 2 + 1) - 2) // 2 + 1
    return int(_get_feat_extract_output_lengths(samples // HOP))


@torch.no_grad()
def hf_features(hf: TinyHf, clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Features of each clip as the model's processor makes them of the clip alone, and their mask."""
    extractor = WhisperFeatureExtractor.from_pretrained(hf.directory)
    padding = "max_length" if hf.family == "qwen2_5_omni" else True
    made = [
        extractor(
            clip.numpy(),
            sampling_rate=SAMPLE_RATE,
            padding=padding,
            truncation=hf.family == "qwen2_5_omni",
            return_attention_mask=True,
            return_tensors="pt",
        )
        for clip in clips
    ]
    width = max(one["attention_mask"].shape[1] for one in made)
    features = torch.zeros(len(made), extractor.feature_size, width)
    mask = torch.zeros(len(made), width, dtype=torch.long)
    for row, one in enumerate(made):
        length = one["attention_mask"].shape[1]
        features[row, :, :length] = one["input_features"][0]
        mask[row, :length] = one["attention_mask"][0]
    return features, mask


@torch.no_grad()
def hf_logits(hf: TinyHf, rows: Sequence[Row], *, as_upstream: bool = False) -> list[Tensor]:
    """Logits of prompts that go through transformers as one batch, padded on the right: [time, vocab] of each.

    Without flash attention, transformers 4.57 lets Qwen3's clips attend to each other, and across the windows that
    the model was trained with. `as_upstream` leaves it so; otherwise each window goes through its encoder alone.
    """
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    inputs: dict[str, Any] = {
        "input_ids": pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
    }
    clips = [clip for _, clips in rows for clip in clips]
    if clips and (as_upstream or hf.family == "qwen2_5_omni"):
        inputs["input_features"], inputs["feature_attention_mask"] = hf_features(hf, clips)
    elif clips:
        embeddings = hf.thinker.get_input_embeddings()(inputs["input_ids"])
        placeholders = (inputs["input_ids"] == hf.thinker.config.audio_token_id)[..., None]
        frames = torch.cat([part for clip in clips for part in hf_windows(hf, clip)])
        inputs["inputs_embeds"] = embeddings.masked_scatter(placeholders, frames)
    logits = hf.thinker(**inputs).logits
    return [row[:length] for row, length in zip(logits, lengths.tolist(), strict=True)]


@torch.no_grad()
def hf_greedy(hf: TinyHf, prompt: Row, new_tokens: int) -> list[int]:
    """The most likely continuation of one prompt, of words only.

    With several clips or windows it is read off one token after the other: in `generate` they attend to each other
    (`hf_logits`).
    """
    ids, clips = prompt
    words = slice(FIRST_WORD, len(tiny_tokenizer()))
    if sum(map(len, clips)) > WINDOW_SECONDS * SAMPLE_RATE or len(clips) > 1:
        longer = list(ids)
        for _ in range(new_tokens):
            longer.append(FIRST_WORD + int(hf_logits(hf, [(longer, clips)])[0][-1, words].argmax()))
        return longer[len(ids) :]
    heard = (
        dict(zip(("input_features", "feature_attention_mask"), hf_features(hf, clips), strict=True)) if clips else {}
    )
    generated = hf.thinker.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        **heard,
        max_new_tokens=new_tokens,
        do_sample=False,
        suppress_tokens=[*range(words.start), *range(words.stop, VOCAB_SIZE)],
    )
    continuation: list[int] = generated[0, len(ids) :].tolist()
    return continuation


@torch.no_grad()
def hf_windows(hf: TinyHf, clip: Tensor) -> list[Tensor]:
    """What Qwen3's encoder makes of each window of a clip, one call each."""
    features, mask = hf_features(hf, [clip])
    whole = features[0, :, : int(mask.sum())]
    return [
        tower(hf.thinker, "audio_tower")(window, feature_lens=torch.tensor([window.shape[1]])).last_hidden_state
        for window in whole.split(100 * WINDOW_SECONDS, dim=1)
    ]


def tower(thinker: PreTrainedModel, name: Literal["audio_tower", "visual"]) -> torch.nn.Module:
    """One of a thinker's encoders: of the thinker itself in transformers 4, of its model in 5."""
    return getattr(thinker if hasattr(thinker, name) else thinker.model, name)


def _whole_model(family: Family, special: SpecialTokens, text: dict[str, Any]) -> PreTrainedModel:
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "pad_token_id": special.pad_id,
        "rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [2, 1, 1]},
    }
    audio = {
        "num_mel_bins": 16,
        "d_model": 24,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 40,
        "output_dim": 32,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    # Ids beyond the tokenizer, of tokens that never occur.
    sight: dict[str, Any] = {"vision_start_token_id": VOCAB_SIZE - 1}
    # Transformers 4 looks for it in the text config, 5 here.
    sight |= {name: text[name] for name in text.keys() & {"tie_word_embeddings"}}
    if family == "qwen2_5_omni":
        thinker = sight | {
            "text_config": common | text,
            "audio_config": audio | {"n_window": 50 * WINDOW_SECONDS},
            "vision_config": vision | {"fullatt_block_indexes": [0]},
            "audio_token_index": special.audio_id,
            "audio_start_token_id": special.audio_start_id,
        }
        return Qwen2_5OmniForConditionalGeneration(Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False))
    experts = {
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        # Not hidden_size / heads, as in the model itself.
        "head_dim": 16,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]},
    }
    thinker = sight | {
        "text_config": common | experts | text,
        "audio_config": audio | {"n_window": 50, "n_window_infer": 100 * WINDOW_SECONDS, "downsample_hidden_size": 6},
        "vision_config": vision | {"deepstack_visual_indexes": [0]},
        "audio_token_id": special.audio_id,
        "audio_start_token_id": special.audio_start_id,
    }
    return Qwen3OmniMoeForConditionalGeneration(Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False))


def _add_talker(directory: Path) -> None:
    """Tensors of the parts that are left aside, in a shard of their own."""
    index_path = directory / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    tensors = {name: torch.arange(float(torch.Size(shape).numel())).view(shape) for name, shape in TALKER.items()}
    save_file(tensors, directory / "talker.safetensors", metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(tensors, "talker.safetensors")
    index_path.write_text(json.dumps(index))


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def imported_model(directory: Path, layout: Mapping[str, Any] | None = None) -> AudioLLM:
    """What import made, in this layout (of this rank), as the trainer reads it."""
    install_cpu_host()
    found = read_model(directory / ORIGINAL)
    config = replace(found.config, target_layers=(found.config.decoder.num_layers - 1,), **(layout or {}))
    initialize_parallel(
        tensor=config.tensor_model_parallel_size,
        pipeline=config.pipeline_model_parallel_size,
        expert=config.expert_model_parallel_size,
    )
    model = build_audio_llm(
        config,
        vocab_size=len(tiny_tokenizer()),
        special=SpecialTokens.from_tokenizer(tiny_tokenizer()),
        sample_rate=SAMPLE_RATE,
        seed=99,
    )
    if found.has_perception:
        load_checkpoint(directory / CHECKPOINT, model)
    else:
        load_part(directory / CHECKPOINT, model, "language_model")
    return model.eval()


@torch.no_grad()
def our_logits(model: AudioLLM, rows: Sequence[Row]) -> list[Tensor]:
    """Logits of the prompts in one batch, padded on the right, on the last pipeline stage."""
    tokens, audio, audio_row = _batch(rows)
    output = forward_all_stages(model, tokens, audio, audio_row)
    if output is None:
        return []
    logits = model.whole_vocabulary(output.logits.flatten(0, 1)).unflatten(0, tokens.shape)
    return [row[: len(ids)] for row, (ids, _) in zip(logits, rows, strict=True)]


def _batch(rows: Sequence[Row]) -> tuple[Tensor, AudioBatch, Tensor]:
    prompts = prompts_of(rows)
    return padded([prompt.token_ids for prompt in prompts]), *audio_of(prompts)


def prompts_of(rows: Sequence[Row]) -> list[Prompt]:
    """Prompts with as many clips as they have."""
    return [Prompt(id=str(n), token_ids=torch.tensor(ids), clips=tuple(clips)) for n, (ids, clips) in enumerate(rows)]
