"""A SALM's directory, made by hand as NeMo writes it; tests/salm compares with NeMo's own class."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nemo_mapo.data.audio_tokens import SALM_TEMPLATES
from nemo_mapo.data.tokenizer import SALM_AUDIO
from nemo_mapo.models.perception import build_perception
from nemo_mapo.models.salm import Salm, SalmFiles, read_salm, salm_name

CONFORMER = "nemo.collections.asr.modules.ConformerEncoder"
CONFIG: dict[str, Any] = {
    "audio_locator_tag": SALM_AUDIO,
    "prompt_format": "qwen",
    "pretrained_llm": "llm",
    "perception": {
        "preprocessor": {
            "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
            "sample_rate": 16000,
            "features": 40,
            "dither": 1e-5,
            "pad_to": 0,
        },
        "encoder": {"_target_": CONFORMER, "feat_in": 40, "n_layers": 1, "d_model": 16, "n_heads": 2, "dropout": 0.1},
        "modality_adapter": {
            "_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector",
            "d_model": 16,
        },
    },
}


def read(folder: Path, **changes: Any) -> Salm:
    (folder / "llm").mkdir(exist_ok=True)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "num_key_value_heads": 4}
    (folder / "llm" / "config.json").write_text(json.dumps({"model_type": "llama", **shape}))
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return read_salm(folder, folder / "llm", audio_tag=SALM_AUDIO, prompt_formats=SALM_TEMPLATES)


def test_the_config_is_read_without_anything_random(tmp_path):
    salm = read(tmp_path, lora={"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM"})
    assert salm.lora_scale == 4.0
    perception = build_perception(salm.model.config.perception, 32, salm.model.sample_rate)
    assert perception.module.preprocessor.featurizer.dither == 0.0
    # A hundred frames a second, as NeMo counts since 2.5, and a quarter of them behind the encoder.
    assert int(perception.module.preprocessor.featurizer.get_seq_len(torch.tensor([16000]))) == 100
    assert perception.num_tokens(16000) == 25


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"audio_locator_tag": "<sound>"}, r"audio_locator_tag='<sound>', only <\|audioplaceholder\|>"),
        ({"prompt_format": "plain"}, "prompt_format='plain', only qwen"),
        ({"lora": {"r": 4, "use_dora": True}}, "lora has use_dora"),
        (
            {"perception": CONFIG["perception"] | {"encoder": {"_target_": "os.system", "command": "true"}}},
            "perception.encoder._target_='os.system'; known are",
        ),
    ],
)
def test_what_is_not_computed_and_code_of_others_are_refused(tmp_path, changes, named):
    with pytest.raises(ValueError, match=rf"config.json: {named}"):
        read(tmp_path, **changes)


def test_tensors_have_the_names_of_the_llm_and_adapters_are_merged(tmp_path):
    module = "llm.base_model.model.model.layers.0.self_attn."
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]])
    save_file(
        {
            # Tied, and written once.
            "llm.base_model.model.lm_head.weight": torch.ones(3, 2),
            f"{module}q_proj.base_layer.weight": torch.eye(2),
            f"{module}q_proj.lora_A.default.weight": a,
            f"{module}q_proj.lora_B.default.weight": b,
            f"{module}k_proj.weight": torch.zeros(2, 2),
            "perception.proj.weight": torch.zeros(1),
        },
        str(tmp_path / "model.safetensors"),
    )
    files = SalmFiles(tmp_path, lora_scale=2.0)
    attention = "model.layers.0.self_attn."
    assert files.tensors.keys() == {
        "model.embed_tokens.weight",
        f"{attention}q_proj.weight",
        f"{attention}k_proj.weight",
        "perception.proj.weight",
    }
    # I + 2 * B A.
    assert files.read(f"{attention}q_proj.weight").tolist() == [[7.0, 12.0], [0.0, 1.0]]
    assert torch.equal(files.read("model.embed_tokens.weight"), torch.ones(3, 2))
    with pytest.raises(ValueError, match="do not agree on whether there are adapters"):
        SalmFiles(tmp_path, lora_scale=None)
    assert [salm_name(name) for name in ("model.embed_tokens.weight", "lm_head.weight", "perception.proj.bias")] == [
        "embed_tokens.weight",
        "llm.lm_head.weight",
        "perception.proj.bias",
    ]
