"""Assemble an audio LLM from an encoder, a text LLM and a new projector between them, for training.

Encoders: a .nemo file of an ASR model, or the Hugging Face directory of Whisper, Qwen2.5-Omni or Qwen3-Omni. Decoders:
the directory of a Llama, Qwen2.5 or Qwen3 model. The audio tokens are added to its tokenizer and vocabulary.
"""

import argparse
from pathlib import Path

from nemo_mapo.console import quiet_upstream
from nemo_mapo.platform import hide_cuda_devices

hide_cuda_devices()
quiet_upstream()

from nemo_mapo.models.encoders import read_any_encoder  # noqa: E402
from nemo_mapo.models.hf.convert import CHECKPOINT, TOKENIZER  # noqa: E402
from nemo_mapo.platform import initialize_parallel, install_cpu_host  # noqa: E402
from nemo_mapo.training.assemble import assemble  # noqa: E402


def main() -> None:
    """Assemble, then print the training command."""
    arguments = _arguments()
    install_cpu_host()
    initialize_parallel()
    try:
        encoder = read_any_encoder(arguments.encoder, projector=arguments.projector, stack=arguments.stack)
        done = assemble(encoder, arguments.decoder, arguments.output, seed=arguments.seed)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    output = arguments.output
    print(f"encoder {done.encoder_parameters:,} and projector {done.projector_parameters:,} parameters in {output}")
    print(f"new tokens, with the mean of the others as their embedding: {' '.join(done.new_tokens)}")
    print(f"an answer ends with {done.end_of_turn}")
    rate = "" if done.sample_rate == 16000 else f" data.train_ds.sample_rate={done.sample_rate}"
    print("the projector is random: the model cannot use audio before supervised training. Train it with:")
    print(f"  python examples/sft.py --config-dir {output}/conf model=imported '~warm_start' \\")
    print(f"    data.tokenizer={output}/{TOKENIZER}{rate} \\")
    print(f"    pretrained_checkpoint.restore_from_path={output}/{CHECKPOINT} ...")
    print("then with examples/train_mapo.py and the same options, from a checkpoint of that run.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help=".nemo file, or Hugging Face directory")
    parser.add_argument("--decoder", type=Path, required=True, help="Hugging Face directory of a text LLM")
    parser.add_argument("--output", type=Path, required=True, help="directory to write; must not exist yet")
    parser.add_argument("--projector", choices=("linear", "mlp", "adapter"), default="mlp")
    parser.add_argument("--stack", type=int, help="encoder frames per audio token (default: 4 for Whisper, else 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the projector's weights (default 0)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
