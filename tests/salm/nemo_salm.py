"""Runs in an environment that has NeMo's SALM class (docs/models.md): makes a tiny SALM, or generates with one.

python nemo_salm.py make LLM_DIR OUTPUT [lora]
python nemo_salm.py generate SALM_DIR INPUTS.pt OUTPUT.pt
"""

import sys
from typing import Any

import torch
from nemo.collections.speechlm2.models.salm import SALM

SAMPLE_RATE = 16000
WIDTH = 16


def config(llm: str, hidden_size: int, *, lora: bool) -> dict[str, Any]:
    """As a user's salm.yaml, with everything tiny."""
    conformer = {
        "_target_": "nemo.collections.asr.modules.ConformerEncoder",
        "feat_out": -1,
        "n_layers": 1,
        "d_model": WIDTH,
        "n_heads": 2,
        "subsampling": "dw_striding",
        "subsampling_conv_channels": 8,
        "conv_kernel_size": 5,
        "dropout": 0.1,
        "dropout_pre_encoder": 0.1,
        "dropout_emb": 0.0,
        "dropout_att": 0.1,
    }
    made: dict[str, Any] = {
        "pretrained_llm": llm,
        "pretrained_asr": "none",
        "pretrained_weights": False,
        "freeze_params": ["^llm\\..+$"],
        "prevent_freeze_params": [],
        "prompt_format": "qwen",
        "audio_locator_tag": "<|audioplaceholder|>",
        "perception": {
            "target": "nemo.collections.speechlm2.modules.perception.AudioPerceptionModule",
            "output_dim": hidden_size,
            "preprocessor": {
                "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
                "sample_rate": SAMPLE_RATE,
                "features": 40,
                "normalize": "per_feature",
                "dither": 1e-5,
                "pad_to": 0,
            },
            "encoder": {**conformer, "feat_in": 40, "subsampling_factor": 8},
            "modality_adapter": {
                "_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector",
                "d_model": WIDTH,
            },
        },
        "optimizer": {"_target_": "torch.optim.AdamW"},
    }
    if lora:
        made["lora"] = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return made


def make(llm: str, output: str, *, lora: bool) -> None:
    """Random weights, far enough apart that rounding does not decide an argmax."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    model = SALM(config(llm, AutoConfig.from_pretrained(llm).hidden_size, lora=lora))
    for name, parameter in model.named_parameters():
        if name.startswith(("llm", "embed")):
            parameter.data = torch.randn_like(parameter) * 0.25 + ("norm" in name)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    model.save_pretrained(output)


@torch.no_grad()
def generate(directory: str, inputs: str, output: str) -> None:
    """Greedy tokens of prompts that are tokenised already, each with its clip."""
    model = SALM.from_pretrained(directory).eval()
    asked = torch.load(inputs)
    found = []
    for tokens, clip in asked["rows"]:
        answer = model.generate(
            prompts=tokens[None],
            audios=clip[None],
            audio_lens=torch.tensor([len(clip)]),
            max_new_tokens=asked["new_tokens"],
            do_sample=False,
            suppress_tokens=asked["suppress"],
        )
        found.append(answer[0].tolist())
    torch.save(found, output)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2], sys.argv[3], lora="lora" in sys.argv[4:])
    else:
        generate(*sys.argv[2:5])
