"""Export a trained model to a directory that transformers loads.

A Qwen Omni thinker, or the decoder of a text LLM, comes from the run's checkpoint, with adapters merged; talker,
vocoder and vision are copied from the original.
"""

import argparse
from pathlib import Path

import torch

from nemo_mapo.console import quiet_upstream
from nemo_mapo.platform import hide_cuda_devices

hide_cuda_devices()
quiet_upstream()

from nemo_mapo.models.hf.adapters import export_adapters  # noqa: E402
from nemo_mapo.models.hf.convert import export_hf  # noqa: E402
from nemo_mapo.models.modular_audio_gpt import is_archive  # noqa: E402
from nemo_mapo.models.salm import is_salm  # noqa: E402
from nemo_mapo.platform import initialize_parallel, install_cpu_host  # noqa: E402
from nemo_mapo.training.modular_audio_gpt import export_modular_audio_gpt  # noqa: E402
from nemo_mapo.training.policies import lora_alpha_of  # noqa: E402
from nemo_mapo.training.salm import export_salm  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    """Convert, one shard in memory at a time."""
    arguments = _arguments()
    install_cpu_host()
    initialize_parallel()
    try:
        print(_export(arguments))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def _export(arguments: argparse.Namespace) -> str:
    """Write the output; returns what to say about it."""
    checkpoint, original, output = arguments.checkpoint, arguments.original, arguments.output
    alpha = lora_alpha_of(checkpoint, arguments.lora_alpha)
    dtype = None if arguments.dtype is None else DTYPES[arguments.dtype]
    if is_archive(original) != (arguments.llm is not None):
        raise ValueError(
            f"{original}: --llm goes with a .nemo file of a ModularAudioGPT as --original, and only with it"
        )
    if arguments.adapters:
        if dtype is not None or arguments.thinker_only:
            raise ValueError("--adapters takes neither --dtype nor --thinker-only")
        if alpha is None:
            raise ValueError(f"{checkpoint} holds no LoRA adapters: leave --adapters out")
        count = export_adapters(checkpoint, original, output, lora_alpha=alpha)
        return f"adapters of {count} modules written to {output}"
    if is_archive(original):
        done = export_modular_audio_gpt(checkpoint, original, arguments.llm, output, dtype=dtype, lora_alpha=alpha)
        return f"{done.tensors} tensors of a NeMo ModularAudioGPT written to {output}"
    if is_salm(original):
        done = export_salm(checkpoint, original, output, dtype=dtype, lora_alpha=alpha)
        return f"{done.tensors} tensors of a NeMo SALM written to {output}"
    done = export_hf(checkpoint, original, output, dtype=dtype, lora_alpha=alpha, thinker_only=arguments.thinker_only)
    return f"{done.tensors} trained tensors written to {output}, {done.left_aside} others carried over"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="such as RUN/checkpoints/step_000100")
    parser.add_argument("--original", type=Path, required=True, help="what was imported: a directory, or a .nemo file")
    parser.add_argument("--output", type=Path, required=True, help="directory to write; must not exist yet")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="dtype of the trained tensors (default: the checkpoint's)"
    )
    parser.add_argument(
        "--lora-alpha", type=float, help="model.lora.alpha of adapters whose checkpoint is not in its run's directory"
    )
    parser.add_argument("--llm", type=Path, help="for a NeMo ModularAudioGPT: directory of the text LLM inside it")
    parser.add_argument(
        "--adapters", action="store_true", help="write only the adapters, in PEFT's format, instead of merging them"
    )
    parser.add_argument(
        "--thinker-only",
        action="store_true",
        help="leave out the other parts; then --original may be IMPORTED/original, which has no weights",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
