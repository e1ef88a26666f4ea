"""Import a Hugging Face model as a Megatron checkpoint. config.json determines the model family.

Qwen2.5-Omni and Qwen3-Omni (the thinker), NeMo's SALM, and a .nemo file of NeMo's older ModularAudioGPT are policies to
train from; text LLMs (Llama, Qwen2.5, Qwen3, dense or with experts) are decoders, to which examples/assemble.py gives
an encoder. Reads local files, safetensors one shard in memory at a time, and downloads nothing.
"""

import argparse
from pathlib import Path

from nemo_mapo.console import quiet_upstream
from nemo_mapo.platform import hide_cuda_devices

hide_cuda_devices()
quiet_upstream()

from nemo_mapo.models.hf.convert import CHECKPOINT, TOKENIZER, Converted, import_hf  # noqa: E402
from nemo_mapo.models.modular_audio_gpt import is_archive  # noqa: E402
from nemo_mapo.models.salm import is_salm  # noqa: E402
from nemo_mapo.platform import initialize_parallel, install_cpu_host  # noqa: E402
from nemo_mapo.training.modular_audio_gpt import import_modular_audio_gpt  # noqa: E402
from nemo_mapo.training.salm import import_salm  # noqa: E402


def main() -> None:
    """Convert, then print the training command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="directory of the model, or .nemo file of a ModularAudioGPT"
    )
    parser.add_argument("--llm", type=Path, help="for NeMo's models: directory of the text LLM inside them")
    parser.add_argument("--output", type=Path, required=True, help="directory to write; must not exist yet")
    arguments = parser.parse_args()
    install_cpu_host()
    initialize_parallel()
    try:
        done = _import(arguments.model, arguments.llm, arguments.output)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    output = arguments.output
    print(f"{done.tensors} tensors written to {output}; {done.left_aside} of talker, vocoder and vision not imported")
    if not done.has_perception:
        print("a text LLM is a decoder without an encoder; make it a policy with:")
        print(f"  python examples/assemble.py --encoder ... --decoder {arguments.model} --output ...")
        return
    print("train from it with:")
    print(f"  python examples/train_mapo.py --config-dir {output}/conf model=imported '~warm_start' \\")
    print(f"    data.tokenizer={output}/{TOKENIZER} pretrained_checkpoint.restore_from_path={output}/{CHECKPOINT} ...")


def _import(model: Path, llm: Path | None, output: Path) -> Converted:
    if is_archive(model):
        if llm is None:
            raise ValueError(f"{model}: a ModularAudioGPT needs --llm, the Hugging Face directory of its LLM")
        return import_modular_audio_gpt(model, llm, output)
    if is_salm(model) != (llm is not None):
        raise ValueError(
            f"{model}: a NeMo SALM (its config.json has pretrained_llm) needs --llm, and no other model takes it"
        )
    return import_hf(model, output) if llm is None else import_salm(model, llm, output)


if __name__ == "__main__":
    main()
