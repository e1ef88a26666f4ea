"""Peak memory of examples/import_hf.py and export_hf.py on a synthetic Qwen2.5-Omni checkpoint of about 2 GB.

Asked for is at most the largest shard and 2 GB more. Memory is the largest resident set of each command's process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5OmniForConditionalGeneration, WhisperFeatureExtractor
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniConfig

from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.models.hf.files import shard_layout

EXAMPLES = Path(__file__).parents[1] / "examples"
ALLOWED_BEYOND_SHARD = 2e9
# The command's own words, and after them its largest resident set in kB.
MEASURED = (
    "import resource, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
    "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
)


def main() -> None:
    """Write the model, run both commands, print their memory; with --check fail above the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22, help="decoder layers of 46 M weights (default: %(default)s)")
    parser.add_argument("--shard-megabytes", type=int, default=500, help="(default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="fail above the largest shard and 2 GB")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        original, imported, exported = (Path(folder) / name for name in ("original", "imported", "exported"))
        total, largest = write_model(original, layers=arguments.layers, shard_bytes=arguments.shard_megabytes * 10**6)
        print(f"weights {total / 1e9:.2f} GB in bfloat16, largest shard {largest / 1e9:.2f} GB")
        peaks = {
            "import": peak("import_hf.py", "--model", original, "--output", imported),
            "export": peak(
                *("export_hf.py", "--checkpoint", imported / "checkpoint"),
                *("--original", original, "--output", exported),
            ),
        }
    bound = largest + ALLOWED_BEYOND_SHARD
    for name, used in peaks.items():
        print(f"{name}: peak {used / 1e9:.2f} GB, bound {bound / 1e9:.2f} GB")
    if arguments.check and max(peaks.values()) > bound:
        sys.exit("above the bound")


def write_model(directory: Path, *, layers: int, shard_bytes: int) -> tuple[int, int]:
    """Random weights, shard by shard; returns bytes in all and of the largest shard."""
    tokenizer = build_tokenizer()
    special = SpecialTokens.from_tokenizer(tokenizer)
    text = {
        "vocab_size": 32000,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [16, 24, 24]},
    }
    thinker = {
        "text_config": text,
        "audio_config": {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "output_dim": 1536},
        "vision_config": {"depth": 1, "hidden_size": 64, "num_heads": 4, "out_hidden_size": 1536},
        "audio_token_index": special.audio_id,
        "audio_start_token_id": special.audio_start_id,
    }
    config = Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Qwen2_5OmniForConditionalGeneration(config).state_dict().items()}
    directory.mkdir()
    config.save_pretrained(directory)
    tokenizer.save_pretrained(str(directory))
    WhisperFeatureExtractor(feature_size=128).save_pretrained(directory)
    layout = shard_layout({name: 2 * shape.numel() for name, shape in shapes.items()}, shard_bytes)
    for file, names in layout.items():
        save_file({name: torch.randn(shapes[name], dtype=torch.bfloat16) for name in names}, str(directory / file))
    weight_map = {name: file for file, names in layout.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sizes = [(directory / file).stat().st_size for file in layout]
    return sum(sizes), max(sizes)


def peak(script: str, *arguments: Path | str) -> int:
    """Largest resident set of an example's process, in bytes."""
    command = [sys.executable, "-c", MEASURED, str(EXAMPLES / script), *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(finished.stderr)
    return 1024 * int(finished.stdout.split("PEAK")[1])


if __name__ == "__main__":
    main()
