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
from nemo_mapo.models.salm import is_salm  # noqa: E402
from nemo_mapo.platform import initialize_parallel, install_cpu_host  # noqa: E402
from nemo_mapo.training.salm import export_salm  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    """Convert, one shard in memory at a time."""
    arguments = _arguments()
    install_cpu_host()
    initialize_parallel()
    try:
        if arguments.adapters:
            if arguments.lora_alpha is None or arguments.dtype is not None or arguments.thinker_only:
                raise ValueError("--adapters needs --lora-alpha, and takes neither --dtype nor --thinker-only")
            checkpoint, original = arguments.checkpoint, arguments.original
            count = export_adapters(checkpoint, original, arguments.output, lora_alpha=arguments.lora_alpha)
            print(f"adapters of {count} modules written to {arguments.output}")
            return
        if is_salm(arguments.original):
            dtype = None if arguments.dtype is None else DTYPES[arguments.dtype]
            done = export_salm(
                arguments.checkpoint, arguments.original, arguments.output, dtype=dtype, lora_alpha=arguments.lora_alpha
            )
            print(f"{done.tensors} tensors of a NeMo SALM written to {arguments.output}")
            return
        done = export_hf(
            arguments.checkpoint,
            arguments.original,
            arguments.output,
            dtype=None if arguments.dtype is None else DTYPES[arguments.dtype],
            lora_alpha=arguments.lora_alpha,
            thinker_only=arguments.thinker_only,
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{done.tensors} trained tensors written to {arguments.output}, {done.left_aside} others carried over")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="such as RUN/checkpoints/step_000100")
    parser.add_argument("--original", type=Path, required=True, help="the Hugging Face directory that was imported")
    parser.add_argument("--output", type=Path, required=True, help="directory to write; must not exist yet")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="dtype of the trained tensors (default: the checkpoint's)"
    )
    parser.add_argument("--lora-alpha", type=float, help="model.lora.alpha of a run with adapters, which are merged")
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
