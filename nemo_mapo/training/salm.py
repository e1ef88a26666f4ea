"""Import and export of NeMo's SALM: a policy from its directory, and a directory that NeMo's own class loads."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from nemo_mapo.data.audio_tokens import SALM_TEMPLATES, with_salm_tokens
from nemo_mapo.data.tokenizer import SALM_AUDIO, load_tokenizer
from nemo_mapo.files import whole_directory
from nemo_mapo.models.hf.checkpoint import CheckpointTensors, model_without_storage
from nemo_mapo.models.hf.config import read_json
from nemo_mapo.models.hf.convert import (
    CHECKPOINT,
    ORIGINAL,
    TOKENIZER,
    TRAINER_STATE,
    Converted,
    check_copies,
    checked,
    write_model_config,
)
from nemo_mapo.models.hf.files import SINGLE, side_files, write_shards
from nemo_mapo.models.hf.streamed import save_streamed
from nemo_mapo.models.salm import Salm, SalmFiles, read_salm, salm_name
from nemo_mapo.models.tensors import Entry
from nemo_mapo.training.assemble import ROWS_PER_TOKEN, vocab_size_of, with_rows

LLM = "llm"
"""Folder of `original` with the side files of the LLM."""


def import_salm(source: Path, llm: Path, output: Path) -> Converted:
    """Write OUTPUT/checkpoint from a SALM, and beside it what training needs. Adapters are merged.

    Args:
        source: directory that NeMo's `SALM.save_pretrained` made.
        llm: Hugging Face directory of the LLM that it was built from, for its config and tokenizer.
        output: directory to write.

    Raises:
        ValueError: naming the file, tensor or option that is wrong; nothing is left behind.
    """
    salm = _read(source, llm)
    files = SalmFiles(source, lora_scale=salm.lora_scale)
    tokenizer = load_tokenizer(llm)
    new_ids = with_salm_tokens(tokenizer, read_json(source / "config.json")["prompt_format"])
    old_rows = vocab_size_of(salm.model)
    # Rows of vocabulary padding stay unchanged; otherwise the model could not be exported bit for bit.
    beyond = [token for token in new_ids if token >= old_rows]
    model = salm.model.with_vocabulary(max(old_rows, len(tokenizer)))
    state = model_without_storage(model).sharded_state_dict()
    ours = [name for name, entry in state.items() if isinstance(entry, Entry)]
    sources = model.weights.sources(ours, files.tensors)
    check_copies(model.weights, files)
    for name, found in sources.items():
        state[name] = checked(state[name], name, found, files, rows=old_rows if name in ROWS_PER_TOKEN else None)

    def read(name: str) -> Tensor:
        tensor = sources[name].layout.fuse([files.read(theirs) for theirs in sources[name].theirs])
        return with_rows(tensor, vocab_size_of(model), beyond) if beyond and name in ROWS_PER_TOKEN else tensor

    with whole_directory(output) as folder:
        for origin, target in ((source, folder / ORIGINAL), (llm, folder / ORIGINAL / LLM)):
            target.mkdir()
            for path in side_files(origin):
                shutil.copy2(path, target / path.name)
        tokenizer.save_pretrained(str(folder / TOKENIZER))
        write_model_config(folder, model, f"SALM {source.name} with {llm.name}; made by examples/import_hf.py.")
        (folder / CHECKPOINT).mkdir()
        save_streamed(state, read, folder / CHECKPOINT)
        (folder / CHECKPOINT / TRAINER_STATE).write_text("{}\n")
    return Converted(tensors=len(ours), left_aside=0, has_perception=True)


def export_salm(
    checkpoint: Path,
    original: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    lora_alpha: float | None = None,
) -> Converted:
    """Write a directory that NeMo's `SALM.from_pretrained` loads; adapters, from either side, are merged.

    Rows of the vocabulary beyond those of the LLM, of the placeholder and the padding, are left out: NeMo never reads
    them.

    Args:
        checkpoint: of a run that began from `original`, or of import.
        original: the folder `original` written by import.
        output: directory to write.
        dtype: of the tensors; None is the checkpoint's.
        lora_alpha: `model.lora.alpha` of a run with adapters.

    Raises:
        ValueError: naming the file, tensor or option that is wrong; nothing is left behind.
    """
    salm = _read(original, original / LLM)
    tokenizer = load_tokenizer(original / LLM)
    values = read_json(original / "config.json")
    with_salm_tokens(tokenizer, values["prompt_format"])
    rows = vocab_size_of(salm.model)
    model = salm.model.with_vocabulary(max(rows, len(tokenizer)))
    tensors = CheckpointTensors(checkpoint, model, lora_alpha=lora_alpha)
    sources = {name: model.weights.source(name) for name in tensors.names}
    # Without its adapters, which NeMo would add again.
    values.pop("lora", None)

    def read(names: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, source in sources.items():
            fused = tensors.read(name)
            fused = fused[:rows] if name in ROWS_PER_TOKEN else fused
            fused = fused if dtype is None or not fused.is_floating_point() else fused.to(dtype)
            parts = source.layout.split(fused)
            named = zip(source.theirs, parts, strict=True)
            found |= {salm_name(theirs): part.contiguous().clone() for theirs, part in named}
        assert sorted(found) == sorted(names)
        return found

    theirs = [salm_name(name) for source in sources.values() for name in source.theirs]
    with whole_directory(output) as folder:
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        written = write_shards(folder, {SINGLE: theirs}, read)
    return Converted(tensors=written, left_aside=0, has_perception=True)


def _read(directory: Path, llm: Path) -> Salm:
    return read_salm(directory, llm, audio_tag=SALM_AUDIO, prompt_formats=SALM_TEMPLATES)
