"""Runs NeMo's ModularAudioGPTModel on a CPU without Transformer Engine and Apex: saves tiny archives, computes logits.

python nemo_modular_audio_gpt.py make LLM_DIR OUTPUT.nemo whole|frozen
python nemo_modular_audio_gpt.py logits ARCHIVE.nemo INPUTS.pt OUTPUT.pt

NeMo imports both packages where it builds a decoder. What is put in their place here: the local layer spec of
Megatron-core, no list of pretrained BERTs, no settings of the CUDA container, and an empty module for an import of
the adapters. Megatron-core runs on the CPU as in all tests. It calls NeMo's adapted attention with an argument that
this one does not know, so hooks add the outputs of NeMo's adapters where its forward does. Model, perception, adapters,
prompts and files are NeMo's own.
"""

import sys
import types
from typing import Any

import torch

WIDTH, SAMPLE_RATE = 16, 16000


def stand_ins() -> None:
    """What NeMo needs to import and build the model here."""
    extension = types.ModuleType("megatron.core.extensions.transformer_engine")
    vars(extension)["SplitAlongDim"] = None
    sys.modules[extension.__name__] = extension
    from nemo.collections.nlp.models import nlp_model
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_model
    from nemo.collections.nlp.models.language_modeling.megatron_base_model import MegatronBaseModel

    local_spec = megatron_gpt_model.get_gpt_layer_local_spec
    nlp_model.get_megatron_pretrained_bert_models = list
    MegatronBaseModel._enable_nvidia_optimizations = lambda self: None
    megatron_gpt_model.build_model = lambda model_provider_func, **_: [model_provider_func(True, True)]
    megatron_gpt_model.get_specs = lambda name, config, *_: local_spec(normalization=config.normalization)


def config(llm: str, *, frozen: bool) -> dict[str, Any]:
    """As NeMo's modular_audio_gpt_config_peft.yaml once its parts are merged, with everything tiny."""
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
    hidden_size = 32
    return {
        "mcore_gpt": True,
        "transformer_engine": False,
        "use_cpu_initialization": True,
        "precision": 32,
        "megatron_amp_O2": False,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "encoder_seq_length": 512,
        "max_position_embeddings": 512,
        "num_layers": 2,
        "hidden_size": hidden_size,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "normalization": "rmsnorm",
        "layernorm_epsilon": 1e-6,
        "bias": False,
        "activation": "fast-swiglu",
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "share_embeddings_and_output_weights": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_add_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "freeze_llm": frozen,
        "freeze_audio_encoder": False,
        "freeze_modality_adapter": False,
        "tokenizer": {"library": "huggingface", "type": llm, "use_fast": True},
        # Frozen, the LLM is the one in the directory; otherwise NeMo pads its vocabulary.
        **({"override_vocab_size": 420} if frozen else {"make_vocab_size_divisible_by": 128}),
        "optim": {"name": "fused_adam", "lr": 1e-4},
        "peft": {
            "peft_scheme": "lora",
            "restore_from_path": None,
            "lora_tuning": {
                "target_modules": ["attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"],
                "adapter_dim": 4,
                "alpha": 12,
                "adapter_dropout": 0.0,
                "column_init_method": "xavier",
                "row_init_method": "xavier",
                "layer_selection": None,
                "weight_tying": False,
                "position_embedding_strategy": None,
            },
        },
        "data": {
            "end_string": "[EOG]",
            "train_ds": {
                "sample_rate": SAMPLE_RATE,
                "context_key": "input",
                "answer_key": "output",
                "add_bos": False,
                "add_eos": True,
                "add_sep": False,
                "end_string": "${data.end_string}",
                "prompt_template": "is it : {input}\\n ok ? {output}",
            },
        },
        "perception": {
            "output_dim": hidden_size,
            "use_multi_layer_feat": False,
            "preprocessor": {
                "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
                "sample_rate": SAMPLE_RATE,
                "features": 40,
                "normalize": "per_feature",
                "dither": 1e-5,
                "pad_to": 0,
            },
            "encoder": {**conformer, "feat_in": 40, "subsampling_factor": 8},
            "modality_adapter": {**conformer, "feat_in": WIDTH, "subsampling_factor": 2},
            "spec_augment": {
                "_target_": "nemo.collections.asr.modules.SpectrogramAugmentation",
                "freq_masks": 2,
                "time_masks": 10,
                "freq_width": 27,
                "time_width": 0.05,
            },
        },
    }


def built(values: dict[str, Any]) -> Any:
    """NeMo's model with fresh adapters."""
    import lightning.pytorch as pl
    from nemo.collections.multimodal.speech_llm.models.modular_models import ModularAudioGPTModel
    from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP
    from omegaconf import OmegaConf

    target = f"{ModularAudioGPTModel.__module__}.{ModularAudioGPTModel.__name__}"
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    model = ModularAudioGPTModel(OmegaConf.create({**values, "target": target}), trainer)
    model.add_adapter(PEFT_CONFIG_MAP["lora"](model.cfg))
    return model


def make(llm: str, output: str, *, frozen: bool) -> None:
    """Random weights, far enough apart that rounding does not decide an argmax; saved as at the end of training."""
    from lightning.pytorch.trainer.states import TrainerFn

    torch.manual_seed(0)
    model = built(config(llm, frozen=frozen))
    for name, parameter in model.model.named_parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 + ("norm" in name)
    for name, buffer in model.perception.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    model.setup_complete, model.trainer.state.fn = True, TrainerFn.FITTING
    model.save_to(output)


def hook_adapters(model: Any) -> None:
    """Give attention and MLP the forward of Megatron-core, and add each adapter to the linear that it belongs to."""
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.mlp import MLP

    places = {
        "lora_kqv_adapter": "linear_qkv",
        "lora_dense_attention_adapter": "linear_proj",
        "lora_hto4h_adapter": "linear_fc1",
        "lora_4htoh_adapter": "linear_fc2",
    }
    for layer in model.model.decoder.layers:
        for module, plain in ((layer.self_attention, SelfAttention), (layer.mlp, MLP)):
            for name, adapter in module.adapter_layer.items():
                linear = getattr(module, places[name])
                linear.register_forward_hook(
                    lambda _, given, out, adapter=adapter: (out[0] + adapter(given[0]), *out[1:])
                )
            module.__class__ = plain


@torch.no_grad()
def logits(archive: str, inputs: str, output: str) -> None:
    """Prompts as NeMo's dataset tokenises them, and logits at their text behind their clips.

    Every weight comes from the archive or, for an archive without them, from the LLM given.
    """
    import tarfile

    from nemo.collections.multimodal.speech_llm.parts.utils.data_utils import TextProcessing
    from omegaconf import OmegaConf

    with tarfile.open(archive) as members:
        values = OmegaConf.to_container(OmegaConf.create(members.extractfile("./model_config.yaml").read().decode()))
        state = torch.load(members.extractfile("./model_weights.ckpt"), weights_only=True)
    asked = torch.load(inputs)
    model = built({**values, "perception": {**values["perception"], "spec_augment": None}})
    model.perception.preprocessor.featurizer.dither = 0.0
    # Beside a frozen LLM, adapters are saved with a second prefix.
    given = {
        name.replace("model.model.", "model."): value
        for name, value in {**asked["llm"], **state}.items()
        if value is not None
    }
    # Not its own load_state_dict, which skips what is missing.
    missing, unexpected = torch.nn.Module.load_state_dict(model, given, strict=False)
    assert not unexpected and not [name for name in missing if not name.endswith("_extra_state")], (missing, unexpected)
    model.eval()
    hook_adapters(model)
    data = model.cfg.data.train_ds
    names = ("context_key", "answer_key", "add_bos", "add_eos", "add_sep", "end_string", "prompt_template")
    process = TextProcessing(model.tokenizer, **{name: data[name] for name in names})
    found = []
    for question, clip in asked["rows"]:
        tokens = torch.tensor(process(question, "low")["context_ids"])
        batch = {
            "audio_signal": clip[None],
            "audio_signal_length": torch.tensor([len(clip)]),
            "tokens": tokens[None],
            "tokens_length": torch.tensor([len(tokens)]),
            "labels": tokens[None],
            "loss_mask": torch.ones(1, len(tokens)),
        }
        embedded, mask, _, _, _ = model.prepare_llm_input(batch)
        scores = model._gpt_forward(None, None, embedded, mask, None, None)
        found.append((tokens, scores[0, -len(tokens) :]))
    torch.save(found, output)


if __name__ == "__main__":
    stand_ins()
    from nemo_mapo.platform import initialize_parallel, install_cpu_host

    install_cpu_host()
    initialize_parallel()
    if sys.argv[1] == "make":
        make(sys.argv[2], sys.argv[3], frozen=sys.argv[4] == "frozen")
    else:
        logits(*sys.argv[2:5])
