"""NeMo's SALM (collection speechlm2): its directory as the tensors of a Hugging Face LLM and of a perception module.

Format: `save_pretrained` of `nemo.collections.speechlm2.models.SALM`, config.json and model.safetensors. The embedding
lies outside the LLM; with LoRA the LLM is PEFT's, whose adapters are merged here.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from nemo_mapo.config.model import ModelConfig, NemoPerceptionConfig
from nemo_mapo.models.hf.config import read_json
from nemo_mapo.models.hf.files import ModelFiles, Stored
from nemo_mapo.models.hf.models import HfModel, read_model
from nemo_mapo.models.hf.weights import EMBEDDING, HEAD, Rule, WeightMap
from nemo_mapo.models.nemo_encoder import without_randomness
from nemo_mapo.upstream.nemo import IDENTITY_ADAPTER, NEWER_IDENTITY_ADAPTER

SALM_RULES: Final = (Rule("perception.module.{name}", ("perception.{name}",)),)
PREPROCESSOR: Final = "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor"
CONFORMER: Final = "nemo.collections.asr.modules.ConformerEncoder"
_TARGETS: Final = {
    "preprocessor": (PREPROCESSOR,),
    "encoder": (CONFORMER,),
    "modality_adapter": (CONFORMER, NEWER_IDENTITY_ADAPTER),
}
"""Classes that a config may name; any other would be code of its author's choice."""
_PEFT: Final = "llm.base_model.model."
_ADAPTED: Final = re.compile(
    r"(?P<module>.+)\.(?P<part>base_layer\.weight|lora_A\.default\.weight|lora_B\.default\.weight)"
)
_LORA_KNOWN: Final = {"task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "inference_mode"}


@dataclass(frozen=True, kw_only=True)
class Salm:
    """The model that a SALM directory and its LLM's directory describe."""

    model: HfModel
    llm: Path
    lora_scale: float | None
    """alpha / rank of adapters; None without adapters."""


def is_salm(directory: Path) -> bool:
    """Whether config.json is a SALM's."""
    return "audio_locator_tag" in read_json(directory / "config.json")


def read_salm(directory: Path, llm: Path, *, audio_tag: str, prompt_formats: Collection[str]) -> Salm:
    """Read the config of a SALM and that of its LLM.

    Args:
        directory: directory of the SALM.
        llm: Hugging Face directory of the LLM that config.json names as pretrained_llm.
        audio_tag: the supported placeholder.
        prompt_formats: the supported layouts of turns.

    Raises:
        ValueError: naming what is not supported, and its value.
    """
    path = directory / "config.json"
    values = read_json(path)
    wanted = {"audio_locator_tag": (audio_tag,), "prompt_format": prompt_formats}
    for name, right in wanted.items():
        if values.get(name) not in right:
            raise ValueError(f"{path}: {name}={values.get(name)!r}, only {' or '.join(right)} is supported")
    decoder = read_model(llm)
    if decoder.has_perception:
        raise ValueError(f"{llm} is not a text LLM; give the directory of {values.get('pretrained_llm')}")
    module = perception_module(values.get("perception") or {}, str(path), _TARGETS)
    config = ModelConfig(
        perception=NemoPerceptionConfig(module=module, features="nemo_2_5"), decoder=decoder.config.decoder
    )
    model = HfModel(
        config=config,
        weights=WeightMap(config.decoder, rules=SALM_RULES),
        has_perception=True,
        audio_token_id=0,
        sample_rate=module["preprocessor"]["sample_rate"],
    )
    return Salm(model=model, llm=llm, lora_scale=_lora_scale(values.get("lora"), path))


class SalmFiles(ModelFiles):
    """The tensors of a SALM, by the names that its LLM has on its own; adapters are merged as they are read."""

    def __init__(self, directory: Path, *, lora_scale: float | None) -> None:
        super().__init__(directory)
        self.lora_scale = lora_scale
        self._stored_name: dict[str, str] = {}
        self._adapters: dict[str, tuple[str, str]] = {}
        found: dict[str, Stored] = {}
        for name, stored in self.tensors.items():
            theirs = _plain_name(name)
            match = _ADAPTED.fullmatch(theirs)
            if match is not None and not match["part"].startswith("base_layer"):
                continue
            if match is not None:
                theirs = f"{match['module']}.weight"
                stem = name.removesuffix("base_layer.weight")
                self._adapters[theirs] = (f"{stem}lora_A.default.weight", f"{stem}lora_B.default.weight")
            found[theirs] = stored
            self._stored_name[theirs] = name
        if EMBEDDING not in found and HEAD in found:
            # A tied tensor is written once, under either name.
            found[EMBEDDING], self._stored_name[EMBEDDING] = found.pop(HEAD), self._stored_name.pop(HEAD)
        if bool(self._adapters) != (lora_scale is not None):
            raise ValueError(f"{directory}: config.json and the weights do not agree on whether there are adapters")
        self._all, self.tensors = self.tensors, found

    def read(self, name: str) -> Tensor:
        """The tensor; W + alpha / rank * B A is added in float32 at least and rounded once."""
        weight = self._plain(self._stored_name[name])
        if name not in self._adapters:
            return weight
        assert self.lora_scale is not None, "checked when it was opened"
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a, b = (self._plain(part).to(dtype) for part in self._adapters[name])
        return torch.addmm(weight.to(dtype), b, a, alpha=self.lora_scale).to(weight.dtype)

    def _plain(self, stored_name: str) -> Tensor:
        named, self.tensors = self.tensors, self._all
        try:
            return super().read(stored_name)
        finally:
            self.tensors = named


def salm_name(theirs: str) -> str:
    """Name in a SALM without adapters of a tensor of its LLM or its perception."""
    if theirs == EMBEDDING:
        return "embed_tokens.weight"
    return theirs if theirs.startswith("perception.") else f"llm.{theirs}"


def _plain_name(name: str) -> str:
    if name == "embed_tokens.weight":
        return EMBEDDING
    return name.removeprefix(_PEFT) if name.startswith(_PEFT) else name.removeprefix("llm.")


def perception_module(
    perception: Mapping[str, Any], where: str, targets: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The perception module's config in our form: nothing random, and only the classes of NeMo in `targets`.

    Raises:
        ValueError: beginning with `where`, naming a part with another class.
    """
    module: dict[str, Any] = {}
    for part, known in targets.items():
        values = perception.get(part)
        if not isinstance(values, dict) or values.get("_target_") not in known:
            target = values.get("_target_") if isinstance(values, dict) else None
            raise ValueError(f"{where}: perception.{part}._target_={target!r}; known are {', '.join(known)}")
        module[part] = dict(values)
    module["preprocessor"]["dither"] = 0.0
    module["encoder"] = without_randomness(module["encoder"])
    adapter = module["modality_adapter"]
    if adapter["_target_"] == NEWER_IDENTITY_ADAPTER:
        adapter["_target_"] = IDENTITY_ADAPTER
    elif adapter["_target_"] == CONFORMER:
        module["modality_adapter"] = without_randomness(adapter)
    return module


def _lora_scale(lora: Any, path: Path) -> float | None:
    if lora is None:
        return None
    unknown = sorted(name for name in lora if name not in _LORA_KNOWN)
    if unknown or lora.get("bias", "none") != "none":
        raise ValueError(
            f"{path}: lora has {', '.join(unknown) or 'bias'}, which may change what the adapters compute; "
            "merge them with NeMo"
        )
    return float(lora.get("lora_alpha", 8)) / int(lora.get("r", 8))
