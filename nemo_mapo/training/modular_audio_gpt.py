"""Import and export of NeMo's ModularAudioGPT: a policy from a `.nemo` archive, and a trained one into a copy of it."""

import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any, Final

import torch
from torch import Tensor

from nemo_mapo.data.audio_tokens import with_layout_tokens
from nemo_mapo.data.tokenizer import load_tokenizer
from nemo_mapo.files import whole_directory
from nemo_mapo.models.hf.checkpoint import CheckpointTensors, model_without_storage
from nemo_mapo.models.hf.convert import CHECKPOINT, TRAINER_STATE, Converted, check_copies, checked
from nemo_mapo.models.hf.files import ModelFiles
from nemo_mapo.models.hf.models import HfModel
from nemo_mapo.models.hf.streamed import save_streamed
from nemo_mapo.models.hf.weights import WeightMap
from nemo_mapo.models.modular_audio_gpt import (
    WEIGHTS,
    ArchiveFiles,
    ModularAudioGpt,
    read_modular_audio_gpt,
)
from nemo_mapo.models.tensors import Entry
from nemo_mapo.training.assemble import ROWS_PER_TOKEN, vocab_size_of, with_rows, write_side_files

_EMBEDDING: Final = "model.embedding.word_embeddings.weight"
_SCRATCH: Final = "weights.ckpt"


def import_modular_audio_gpt(archive: Path, llm: Path, output: Path) -> Converted:
    """Write OUTPUT/checkpoint from an archive, and beside it what training needs. Adapters are merged.

    An archive that was trained with a frozen LLM does not hold it; then it is read from `llm`.

    Args:
        archive: `.nemo` file of a ModularAudioGPTModel.
        llm: Hugging Face directory of the LLM that it was built from.
        output: directory to write.

    Raises:
        ValueError: naming the file, tensor or option that is wrong; nothing is left behind.
    """
    found = read_modular_audio_gpt(archive, llm)
    with whole_directory(output) as folder:
        files = ArchiveFiles(archive, folder / _SCRATCH, lora_scale=found.lora_scale)
        tokenizer = load_tokenizer(llm)
        old_rows = _rows(found, files)
        if len(tokenizer) > old_rows:
            raise ValueError(
                f"{llm} has {len(tokenizer)} tokens, but the embedding in {archive} only {old_rows} rows: give the LLM "
                "that it was built from"
            )
        new_ids = with_layout_tokens(tokenizer, found.prompt)
        # Rows of vocabulary padding stay unchanged, as for a SALM.
        beyond = [token for token in new_ids if token >= old_rows]
        model = found.model.with_vocabulary(max(old_rows, len(tokenizer)))
        tensors = _Tensors(model, files, llm)
        state = model_without_storage(model).sharded_state_dict()
        tensors.check(state, old_rows)

        def read(name: str) -> Tensor:
            tensor = tensors.read(name)
            return with_rows(tensor, vocab_size_of(model), beyond) if beyond and name in ROWS_PER_TOKEN else tensor

        made_by = f"ModularAudioGPT {archive.name} with {llm.name}; made by examples/import_hf.py."
        write_side_files(llm, folder, model, tokenizer, made_by)
        (folder / CHECKPOINT).mkdir()
        save_streamed(state, read, folder / CHECKPOINT)
        (folder / CHECKPOINT / TRAINER_STATE).write_text("{}\n")
        (folder / _SCRATCH).unlink()
    return Converted(tensors=len(tensors.names), left_aside=0, has_perception=True)


def export_modular_audio_gpt(
    checkpoint: Path,
    archive: Path,
    llm: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    lora_alpha: float | None = None,
) -> Converted:
    """Write a copy of an archive with the weights of a run, for NeMo's ModularAudioGPTModel.

    Adapters, from either side, are merged; those of the archive stay in it with `linear_out` zero. All weights are in
    memory at once, as they are when NeMo reads them.

    Args:
        checkpoint: of a run that began from the archive, or of its import.
        archive: the `.nemo` file that was imported.
        llm: Hugging Face directory of the LLM that it was built from.
        output: `.nemo` file to write.
        dtype: of the tensors; None is the checkpoint's.
        lora_alpha: `model.lora.alpha` of a run with adapters.

    Raises:
        ValueError: naming the file, tensor or option that is wrong; or the archive holds no LLM. Nothing is left
            behind.
    """
    found = read_modular_audio_gpt(archive, llm)
    if output.exists():
        raise ValueError(f"{output} already exists: remove it, or name another file")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as made:
        folder = Path(made)
        files = ArchiveFiles(archive, folder / _SCRATCH, lora_scale=found.lora_scale)
        if not files.has_llm:
            raise ValueError(
                f"{archive} holds adapters and perception, not the LLM that they belong to, and cannot hold another "
                "one: export the decoder for transformers with --original IMPORTED/original --thinker-only"
            )
        rows = _rows(found, files)
        tokenizer = load_tokenizer(llm)
        with_layout_tokens(tokenizer, found.prompt)
        model = found.model.with_vocabulary(max(rows, len(tokenizer)))
        tensors = CheckpointTensors(checkpoint, model, lora_alpha=lora_alpha)
        sources = model.weights.sources(tensors.names, files.tensors)
        for name, source in sources.items():
            trained = tensors.read(name)[:rows] if name in ROWS_PER_TOKEN else tensors.read(name)
            stored = files.stored_name[source.theirs[0]]
            files.state[stored] = trained if dtype is None or not trained.is_floating_point() else trained.to(dtype)
        for parts in files.adapters.values():
            files.state[parts["linear_out"]] = torch.zeros_like(files.state[parts["linear_out"]])
        torch.save(files.state, folder / WEIGHTS)
        _copy_archive(archive, folder / WEIGHTS, folder / output.name)
        (folder / output.name).rename(output)
    return Converted(tensors=len(sources), left_aside=0, has_perception=True)


class _Tensors:
    """Where each of our tensors comes from: the archive, or the LLM's directory for a decoder that is not in it."""

    def __init__(self, model: HfModel, files: ArchiveFiles, llm: Path) -> None:
        self.model, self.files = model, files
        self.names: list[str] = []
        self._llm = None if files.has_llm else ModelFiles(llm)
        self._hf = WeightMap(model.config.decoder)

    def check(self, state: dict[str, Any], rows: int) -> None:
        """Compare names and shapes, and give the entries of `state` the files' dtypes."""
        self.names = [name for name, entry in state.items() if isinstance(entry, Entry)]
        mine = [name for name in self.names if self._llm is None or name.startswith("perception.")]
        sources = self.model.weights.sources(mine, self.files.tensors)
        for name in self.names:
            entry, limit = state[name], rows if name in ROWS_PER_TOKEN else None
            if name in sources:
                state[name] = checked(entry, name, sources[name], self.files, rows=limit)
        if lost := self.files.adapters.keys() - {self.model.weights.source(name).theirs[0] for name in self.names}:
            raise ValueError(f"{self.files.directory}: an adapter of {min(lost)}, which the model does not have")
        if self._llm is None:
            return
        theirs = self._hf.sources([name for name in self.names if name not in sources], self._llm.tensors)
        check_copies(self._hf, self._llm)
        for name, source in theirs.items():
            limit = rows if name in ROWS_PER_TOKEN else None
            state[name] = checked(state[name], name, source, self._llm, rows=limit)

    def read(self, name: str) -> Tensor:
        """One of our tensors, its adapter merged."""
        (theirs,) = self.model.weights.source(name).theirs
        if self._llm is None or name.startswith("perception."):
            return self.files.read(theirs)
        source = self._hf.source(name)
        return self.files.merged(theirs, source.layout.fuse([self._llm.read(part) for part in source.theirs]))


def _rows(found: ModularAudioGpt, files: ArchiveFiles) -> int:
    """Rows of the embedding: NeMo pads the vocabulary."""
    if _EMBEDDING in files.tensors:
        return files.tensors[_EMBEDDING].shape[0]
    return vocab_size_of(found.model)


def _copy_archive(archive: Path, weights: Path, output: Path) -> None:
    """Copy an archive member by member, with other weights."""
    with tarfile.open(archive) as members, tarfile.open(output, "w:") as target:
        for member in members:
            if str(PurePosixPath(member.name)) == WEIGHTS:
                member.size = weights.stat().st_size
                with weights.open("rb") as file:
                    target.addfile(member, file)
            elif member.isfile():
                target.addfile(member, members.extractfile(member))
            else:
                target.addfile(member)
