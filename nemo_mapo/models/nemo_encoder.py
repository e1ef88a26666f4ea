"""Encoders of NeMo's ASR models: into the perception module, and back into files that NeMo loads."""

from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Shaped
from torch import Tensor

from nemo_mapo.config.model import NemoPerceptionConfig
from nemo_mapo.models.nemo_files import refuse_code
from nemo_mapo.models.perception import NemoPerception
from nemo_mapo.upstream.nemo import IDENTITY_ADAPTER, features_of

PARTS: Final = ("preprocessor.", "encoder.")
"""Prefixes of the parts that an ASR model and the perception module have in common."""
ASR_FILE, MODULE_CONFIG, MODULE_WEIGHTS = "asr.nemo", "perception.yaml", "perception.pt"
_DROPOUTS = ("dropout", "dropout_pre_encoder", "dropout_emb", "dropout_att")
_ADAPTER_LAYERS: Final = 2


def perception_config(asr: Path) -> NemoPerceptionConfig:
    """The perception module with the preprocessor and encoder of an ASR model, and the mel features of its NeMo.

    Dither, dropout and skipped layers are switched off, and of several attention contexts the first is taken, as NeMo
    does in evaluation: a clip must sound the same in every pass.

    perception_config(Path("asr.nemo")).features  # "nemo_2_3" if the file says nemo_version: 2.3.3

    Raises:
        ValueError: the file is not an ASR model of NeMo, or its encoder has no `d_model`.
    """
    from omegaconf import OmegaConf

    config = _restored(asr, return_config=True)
    plain = OmegaConf.to_container(OmegaConf.create({name: config.get(name) for name in ("preprocessor", "encoder")}))
    assert isinstance(plain, dict)
    preprocessor, encoder = plain["preprocessor"], plain["encoder"]
    if not encoder or "d_model" not in encoder:
        raise ValueError(f"{asr}: encoder.d_model is missing; only encoders of the Conformer family are supported")
    module = {
        "preprocessor": {**preprocessor, "dither": 0.0},
        "encoder": without_randomness(encoder),
        "modality_adapter": {"_target_": IDENTITY_ADAPTER, "d_model": encoder["d_model"]},
    }
    return NemoPerceptionConfig(module=module, features=features_of(str(config.get("nemo_version", "1.0"))))


def without_randomness(encoder: dict[str, Any]) -> dict[str, Any]:
    """A Conformer's config without dropout and skipped layers, and with the first of several attention contexts."""
    return {**_without_several_contexts(encoder), **dict.fromkeys(_DROPOUTS, 0.0)}


def conformer_adapter(encoder: dict[str, Any], *, subsampling: int) -> dict[str, Any]:
    """A modality adapter of two Conformer layers behind an encoder, as in NeMo's speech-LLM examples, without dropout.

    Layer norms replace batch norms, which would start without statistics.
    """
    width = encoder["d_model"]
    return {
        "_target_": "nemo.collections.asr.modules.ConformerEncoder",
        "feat_in": width,
        "feat_out": -1,
        "n_layers": _ADAPTER_LAYERS,
        "d_model": width,
        "subsampling": "dw_striding",
        "subsampling_factor": subsampling,
        "n_heads": encoder.get("n_heads", 4),
        "conv_norm_type": "layer_norm",
        **dict.fromkeys(_DROPOUTS, 0.0),
    }


def _without_several_contexts(encoder: dict[str, Any]) -> dict[str, Any]:
    fixed = {key: value for key, value in encoder.items() if not key.startswith("stochastic_depth")}
    contexts = encoder.get("att_context_size")
    if contexts and not isinstance(contexts[0], int):
        fixed["att_context_size"] = contexts[0]
        fixed.pop("att_context_probs", None)
    return fixed


def load_encoder(perception: NemoPerception, asr: Path) -> None:
    """Load the preprocessor and encoder weights of an ASR model, bit for bit but for a cast to the module's dtype.

    Raises:
        ValueError: naming tensors that are missing, left over or of another shape.
    """
    given = _shared_part(_restored(asr, map_location="cpu").state_dict())
    own = _shared_part(perception.module.state_dict())
    wrong = sorted(given.keys() ^ own.keys())
    wrong += sorted(name for name in given.keys() & own.keys() if given[name].shape != own[name].shape)
    if wrong:
        raise ValueError(
            f"model.perception.restore_from_path={asr}: {wrong[0]} ({len(wrong)} such) is not in both, or differs "
            "in shape from model.perception.module; make the config with examples/import_nemo_encoder.py"
        )
    with torch.no_grad():
        for name, value in given.items():
            own[name].copy_(value)


def save_encoder(perception: NemoPerception, asr: Path, folder: Path) -> None:
    """Write the module for NeMo into a new folder.

    `asr.nemo` is the ASR model `asr` with this preprocessor and encoder, as NeMo's speech-LLM examples take one;
    `perception.yaml` and `perception.pt` are config and state of the whole AudioPerceptionModule, projection included.

    Raises:
        ValueError: the folder already exists, or the ASR model is not the one that the encoder came from.
    """
    from omegaconf import OmegaConf

    model = _restored(asr, map_location="cpu")
    trained, theirs = _shared_part(perception.module.state_dict()), _shared_part(model.state_dict())
    if wrong := sorted(name for name in theirs if name not in trained or theirs[name].shape != trained[name].shape):
        raise ValueError(
            f"{asr}: {wrong[0]} ({len(wrong)} such) is not the trained encoder's; give the model it came from"
        )
    if folder.exists():
        raise ValueError(f"{folder} already exists; remove it or name another directory")
    with torch.no_grad():
        for name, value in theirs.items():
            value.copy_(trained[name])
    folder.mkdir(parents=True)
    model.save_to(str(folder / ASR_FILE))
    OmegaConf.save(perception.module.cfg, folder / MODULE_CONFIG)
    torch.save(perception.module.state_dict(), folder / MODULE_WEIGHTS)


def _restored(asr: Path, **options: Any) -> Any:
    """The ASR model in the file, or its config, as NeMo's own code reads it."""
    import tarfile

    from nemo.collections.asr.models import ASRModel

    if not asr.is_file():
        raise ValueError(f"{asr}: no such file; give a .nemo file of an ASR model")
    try:
        refuse_code(asr)
        return ASRModel.restore_from(str(asr), **options)
    except (tarfile.TarError, FileNotFoundError) as error:
        raise ValueError(f"{asr} is not a .nemo file: {error}") from error


def _shared_part(state: dict[str, Shaped[Tensor, "..."]]) -> dict[str, Shaped[Tensor, "..."]]:
    return {name: value for name, value in state.items() if name.startswith(PARTS)}
