"""NeMo's ModularAudioGPT (collection multimodal.speech_llm, up to NeMo 2.3): its `.nemo` archive as tensors.

The class saves `model_config.yaml` and one pickle of torch, `model_weights.ckpt`: `perception.*`, and of its Megatron
decoder either all of `model.*` or only adapters. It never shards the pickle's tensors unless it was trained with
tensor or pipeline parallelism, and writes no distributed checkpoint, whose folder would lack perception.
"""

import re
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

import torch
from torch import Tensor

from nemo_mapo.config.model import DecoderConfig, ModelConfig, NemoPerceptionConfig
from nemo_mapo.config.yaml_files import read_yaml
from nemo_mapo.models.hf.config import LLAMA3_ROPE
from nemo_mapo.models.hf.files import ModelFiles, Stored
from nemo_mapo.models.hf.models import HfModel, read_model
from nemo_mapo.models.hf.weights import Rule, WeightMap
from nemo_mapo.models.nemo_files import refuse_foreign_classes
from nemo_mapo.models.salm import CONFORMER, PREPROCESSOR, perception_module
from nemo_mapo.models.untrusted import read_tensors
from nemo_mapo.upstream.nemo import IDENTITY_ADAPTER, POOLING_ADAPTERS

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
RULES: Final = (
    Rule("language_model.{name}", ("model.{name}",)),
    Rule("perception.module.{name}", ("perception.{name}",)),
)
"""The decoder is Megatron's on both sides: all tensors have the same layout."""
_CLASS: Final = "nemo.collections.multimodal.speech_llm.models.modular_models.ModularAudioGPTModel"
_MODULE: Final = "nemo.collections.multimodal.speech_llm.modules.perception_modules.AudioPerceptionModule"
_TARGETS: Final = {
    "preprocessor": (PREPROCESSOR,),
    "encoder": (CONFORMER,),
    "modality_adapter": (CONFORMER, IDENTITY_ADAPTER, *POOLING_ADAPTERS),
}
_LORA: Final = "peft.lora_tuning."
_REQUIRED: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "target": (None, (_CLASS,)),
    "mcore_gpt": (False, (True,)),
    "name": ("", ("", "te_gpt")),
    "activation": ("gelu", ("fast-swiglu", "swiglu")),
    "normalization": ("layernorm", ("rmsnorm", "RMSNorm")),
    "layernorm_zero_centered_gamma": (False, (False,)),
    "bias": (True, (False,)),
    "position_embedding_type": ("learned_absolute", ("rope",)),
    "rotary_percentage": (1.0, (1.0,)),
    "rotary_interleaved": (False, (False,)),
    "apply_embedding_scaling": (False, (False,)),
    "num_moe_experts": (None, (None,)),
    "multi_latent_attention": (False, (False,)),
    "window_size": (None, (None,)),
    "mcore_customization_config": (None, (None, {})),
    "drop_layers": (None, (None, [])),
    "peft.peft_scheme": (None, (None, "none", "lora")),
    f"{_LORA}variant": ("nemo", ("nemo",)),
    f"{_LORA}weight_tying": (False, (False,)),
    "perception.target": (_MODULE, (_MODULE,)),
    "perception.encoders": (None, (None,)),
    "perception.speaker_model": (None, (None,)),
    "perception.use_multi_layer_feat": (False, (False,)),
    "data.train_ds.add_sep": (False, (False,)),
    "data.train_ds.add_boa_eoa": (False, (False,)),
    "data.train_ds.virtual_tokens": (0, (0, None)),
}
"""Fields that change the function: NeMo's default, and the values that this project computes."""
_NAMES_OF_TRANSFORMER_ENGINE: Final = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Ends of the names of norms that Transformer Engine fuses with a linear, and their names here."""
_ADAPTER: Final = re.compile(r"(?P<module>.+)\.adapter_layer\.(?P<kind>\w+)\.(?P<part>linear_in|linear_out)\.weight")
_ADAPTED: Final = {
    "lora_kqv_adapter": "linear_qkv",
    "lora_dense_attention_adapter": "linear_proj",
    "lora_hto4h_adapter": "linear_fc1",
    "lora_4htoh_adapter": "linear_fc2",
}
_WRAPPED: Final = re.compile(r"^model\.(?:model\.|module\.)+")
_PROMPT: Final = re.compile(r"(?P<before>.*)\{\w+\}(?P<after>.*)\{\w+\}", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class PromptLayout:
    """What NeMo writes around a question, and where its clips go."""

    before: str
    after: str
    gap: str
    """Between prompt and answer."""
    starts_with_bos: bool
    clips_first: bool
    """Before everything else, `before` included; otherwise where they are in the question."""


@dataclass(frozen=True, kw_only=True)
class ModularAudioGpt:
    """The model that an archive and its LLM's directory describe."""

    model: HfModel
    """With the vocabulary of the LLM's directory."""
    lora_scale: float | None
    """alpha / rank of adapters; None without adapters."""
    prompt: PromptLayout


def is_archive(path: Path) -> bool:
    """Whether a path is that of a `.nemo` file."""
    return path.is_file() and path.suffix == ".nemo"


def read_modular_audio_gpt(archive: Path, llm: Path) -> ModularAudioGpt:
    """Read the config in an archive and that of its LLM.

    Args:
        archive: `.nemo` file of a ModularAudioGPTModel.
        llm: Hugging Face directory of the LLM that it was built from.

    Raises:
        ValueError: naming the field of the config that is not supported, or does not agree with the LLM's.
    """
    where, values = f"{archive}: {CONFIG}", _config(archive)
    wrong = [
        f"{name}={found!r}, only {' or '.join(map(repr, right))} is supported"
        for name, (default, right) in _REQUIRED.items()
        if (found := _get(values, name, default)) not in right
    ]
    decoder = read_model(llm)
    if decoder.has_perception:
        raise ValueError(f"{llm} is not a text LLM; give the directory of the one that {archive.name} was built from")
    ours = decoder.config.decoder
    wrong += [
        f"{name}={found!r}, but {llm} says {right!r}"
        for name, (default, right) in _same_in_both(ours, values).items()
        if (found := _get(values, name, default)) != right
    ]
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}")
    module = perception_module(values["perception"], where, _TARGETS)
    config = ModelConfig(perception=NemoPerceptionConfig(module=module, features="nemo_2_3"), decoder=ours)
    model = replace(
        decoder,
        config=config,
        weights=WeightMap(ours, decoder_rules=RULES),
        has_perception=True,
        sample_rate=module["preprocessor"]["sample_rate"],
    )
    return ModularAudioGpt(model=model, lora_scale=_lora_scale(values), prompt=_prompt(values, where))


class ArchiveFiles(ModelFiles):
    """The decoder and perception in an archive, under the names of Megatron's local layer spec; adapters are merged.

    Args:
        archive: the `.nemo` file.
        scratch: a file that does not exist yet; the weights are copied there, and stay there as long as they are used.
        lora_scale: alpha / rank of the adapters.
    """

    def __init__(self, archive: Path, scratch: Path, *, lora_scale: float | None) -> None:
        self.directory, self.lora_scale = archive, lora_scale
        extract_weights(archive, scratch)
        self.state: dict[str, Any] = read_state(archive, scratch)
        self.stored_name: dict[str, str] = {}
        """Of a tensor, the name in the file."""
        self.adapters: dict[str, dict[str, str]] = {}
        """Names in the file of the `linear_in` and `linear_out` that belong to a weight."""
        for name, value in self.state.items():
            if name.endswith("_extra_state") or not isinstance(value, Tensor):
                continue
            plain = _plain_name(name)
            if ".adapter_layer." in plain:
                self._add_adapter(plain, name)
            else:
                self.stored_name[plain] = name
        for weight, parts in self.adapters.items():
            if lora_scale is None or len(parts) != 2:
                reason = (
                    f"{CONFIG} has no peft.lora_tuning" if lora_scale is None else "one of its two parts is missing"
                )
                raise ValueError(f"{archive}: {weight} has an adapter, but {reason}")
        self.tensors = {
            plain: Stored(WEIGHTS, tuple(self.state[name].shape), self.state[name].dtype)
            for plain, name in self.stored_name.items()
        }
        self.has_llm = any(plain.startswith("model.") for plain in self.stored_name)
        """False for an archive that was trained with a frozen LLM."""

    def read(self, name: str) -> Tensor:
        """The tensor; its adapter is merged."""
        weight: Tensor = self.state[self.stored_name[name]]
        return self.merged(name, weight)

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """W + alpha / rank * B A, in float32 at least and rounded once; W itself if it has no adapter."""
        if name not in self.adapters:
            return weight
        assert self.lora_scale is not None, "checked when it was opened"
        dtype = torch.promote_types(weight.dtype, torch.float32)
        parts = self.adapters[name]
        a, b = (self.state[parts[part]].to(dtype) for part in ("linear_in", "linear_out"))
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise ValueError(f"{self.directory}: {parts['linear_in']} does not fit {name} {tuple(weight.shape)}")
        return torch.addmm(weight.to(dtype), b, a, alpha=self.lora_scale).to(weight.dtype)

    def _add_adapter(self, plain: str, name: str) -> None:
        match = _ADAPTER.fullmatch(plain)
        if match is None or match["kind"] not in _ADAPTED:
            raise ValueError(f"{self.directory}: {name} is an adapter other than {', '.join(_ADAPTED)}")
        weight = f"{match['module']}.{_ADAPTED[match['kind']]}.weight"
        self.adapters.setdefault(weight, {})[match["part"]] = name


def extract_weights(archive: Path, target: Path) -> None:
    """Copy the weights in an archive to `target`, and nothing else.

    Raises:
        ValueError: they are in another form than one pickle.
    """
    with tarfile.open(archive) as members:
        names = {str(PurePosixPath(member.name)): member for member in members}
        member = names.get(WEIGHTS)
        if member is None or not member.isfile():
            found = sorted({name for name in names if "weights" in name or "rank_" in name})[:3]
            raise ValueError(
                f"{archive}: no {WEIGHTS} (it holds {', '.join(found) or 'no weights'}); weights of several ranks, or "
                "a distributed checkpoint, which lacks perception, are not read: let NeMo's class load the model on "
                "one rank and save it again"
            )
        content = members.extractfile(member)
        assert content is not None, "it is a file"
        with target.open("wb") as file:
            shutil.copyfileobj(content, file)


def read_state(archive: Path, weights: Path) -> dict[str, Any]:
    """The state in an archive's extracted weights, mapped from the disk; ValueError if it could run code."""
    where = f"{archive}: {WEIGHTS}"
    state = read_tensors(weights, where, mapped=True)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{where} holds a {type(state).__name__}, not a state by names")
    return dict(state)


def _plain_name(name: str) -> str:
    """A name without the wrapper of mixed precision, and with the norms of Megatron's local layer spec.

    Adapters that are saved beside a frozen LLM have the model's prefix twice.
    """
    name = _WRAPPED.sub("model.", name)
    for theirs, ours in _NAMES_OF_TRANSFORMER_ENGINE.items():
        if name.startswith("model.") and name.endswith(f".{theirs}"):
            return name.removesuffix(theirs) + ours
    return name


def _config(archive: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    where = f"{archive}: {CONFIG}"
    try:
        with tarfile.open(archive) as members:
            found = {str(PurePosixPath(member.name)): member for member in members}.get(CONFIG)
            content = None if found is None or not found.isfile() else members.extractfile(found)
            if content is None:
                raise ValueError(f"{archive} is not a model of NeMo: it has no {CONFIG}")
            values = read_yaml(content.read(), where)
    except tarfile.TarError as error:
        raise ValueError(f"{archive} is not a .nemo file: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("perception"), dict):
        target = values.get("target") if isinstance(values, dict) else None
        raise ValueError(f"{where}: target={target!r} has no section perception; only {_CLASS} is supported")
    # The target is compared with the one that is known; to look it up would import NeMo's trainer.
    refuse_foreign_classes({key: value for key, value in values.items() if key != "target"}, where)
    try:
        plain = OmegaConf.to_container(OmegaConf.create(values), resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {error}") from error
    assert isinstance(plain, dict), "it was a dict"
    return {str(key): value for key, value in plain.items()}


def _same_in_both(decoder: DecoderConfig, values: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that archive and LLM both state: NeMo's default, and the value of the LLM's directory."""
    heads = values.get("num_attention_heads") or decoder.num_attention_heads
    width = (values.get("hidden_size") or decoder.hidden_size) // heads
    linear = decoder.rope_scaling_factor if decoder.rope_scaling == "linear" else None
    same: dict[str, tuple[Any, Any]] = {
        "num_layers": (1, decoder.num_layers),
        "hidden_size": (None, decoder.hidden_size),
        "ffn_hidden_size": (None, decoder.ffn_hidden_size),
        "num_attention_heads": (None, decoder.num_attention_heads),
        "num_query_groups": (heads, decoder.num_query_groups),
        "kv_channels": (width, decoder.kv_channels),
        "layernorm_epsilon": (1e-5, decoder.layernorm_epsilon),
        "rotary_base": (10000, decoder.rotary_base),
        "seq_len_interpolation_factor": (None, linear),
        "scale_positional_embedding": (False, decoder.rope_scaling == "llama3"),
        "share_embeddings_and_output_weights": (True, decoder.share_embeddings_and_output_weights),
        "qkv_bias": (False, decoder.add_qkv_bias),
        "qk_layernorm": (False, decoder.qk_layernorm),
    }
    if decoder.rope_scaling == "llama3":
        same["scale_factor"] = (8, decoder.rope_scaling_factor)
        same["low_freq_factor"] = (1, LLAMA3_ROPE["low_freq_factor"])
        same["high_freq_factor"] = (4, LLAMA3_ROPE["high_freq_factor"])
        same["old_context_len"] = (8192, LLAMA3_ROPE["original_max_position_embeddings"])
    return same


def _lora_scale(values: Mapping[str, Any]) -> float | None:
    lora = _get(values, "peft.lora_tuning", None)
    if _get(values, "peft.peft_scheme", None) != "lora" or not isinstance(lora, dict):
        return None
    rank = int(lora["adapter_dim"])
    alpha = lora.get("alpha")
    return float(rank if alpha is None else alpha) / rank


def _prompt(values: Mapping[str, Any], where: str) -> PromptLayout:
    """The prompt of the training data, as NeMo's dataset puts it together."""
    data = _get(values, "data.train_ds", None) or {}
    bos, locator = bool(data.get("add_bos")), data.get("audio_locator")
    if bos and locator is not None:
        raise ValueError(f"{where}: data.train_ds.add_bos=True with audio_locator={locator!r} is not supported")
    template = data.get("prompt_template")
    if template is None:
        gap = "\n" if data.get("separate_prompt_and_response_with_newline", True) else " "
        return PromptLayout(before="", after="", gap=gap, starts_with_bos=bos, clips_first=locator is None)
    # NeMo takes escapes from the command line.
    match = _PROMPT.fullmatch(template.encode("utf-8").decode("unicode_escape"))
    if match is None:
        raise ValueError(
            f"{where}: data.train_ds.prompt_template={template!r}, only one like 'Q: {{context}}\\nA: {{answer}}', "
            "with the answer at its end, is supported"
        )
    # NeMo strips blanks at both ends of a prompt; those before the answer belong to the answer.
    after = match["after"].rstrip(" ")
    return PromptLayout(
        before=match["before"].lstrip(" "),
        after=after,
        gap=match["after"][len(after) :],
        starts_with_bos=bos,
        clips_first=locator is None,
    )


def _get(values: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value at a dotted path; the default if it is not there or null."""
    found: Any = values
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return default if found is None else found
