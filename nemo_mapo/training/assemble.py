"""Assembles an audio LLM from an encoder, a new projector and a text LLM as decoder, ready for training."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.data.audio_tokens import with_audio_tokens
from nemo_mapo.data.tokenizer import load_tokenizer
from nemo_mapo.files import whole_directory
from nemo_mapo.models.encoders import Encoder, load_weights
from nemo_mapo.models.hf.checkpoint import model_without_storage
from nemo_mapo.models.hf.convert import (
    CHECKPOINT,
    ORIGINAL,
    PERCEPTION_CONFIG,
    TOKENIZER,
    TRAINER_STATE,
    check_copies,
    checked,
    write_model_config,
)
from nemo_mapo.models.hf.files import ModelFiles, side_files
from nemo_mapo.models.hf.models import HfModel, read_model
from nemo_mapo.models.hf.streamed import save_streamed, with_dtype
from nemo_mapo.models.hf.weights import Source
from nemo_mapo.models.perception import build_perception
from nemo_mapo.models.tensors import Entry

_PERCEPTION = "perception."
ROWS_PER_TOKEN = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """What was made."""

    sample_rate: int
    new_tokens: tuple[str, ...]
    """Tokens that the decoder did not have; their rows are the mean of the others."""
    end_of_turn: str
    encoder_parameters: int
    projector_parameters: int


def assemble(encoder: Encoder, decoder: Path, output: Path, *, seed: int) -> Assembled:
    """Write OUTPUT/checkpoint, and beside it config, tokenizer, and the decoder's other files with the new vocabulary.

    Args:
        encoder: of `read_any_encoder`.
        decoder: Hugging Face directory of a text LLM.
        output: directory to write.
        seed: of the projector's weights.

    Raises:
        ValueError: naming the file, tensor or option that is wrong; nothing is left behind.
    """
    model, tokenizer, new_ids = _grown(decoder, encoder)
    files = ModelFiles(decoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        perception = build_perception(encoder.perception, model.config.decoder.hidden_size, encoder.sample_rate)
    load_weights(perception, encoder)
    heard = perception.state_dict()
    state = model_without_storage(model).sharded_state_dict()
    decoder_names = [name for name, entry in state.items() if isinstance(entry, Entry) and not _is_heard(name)]
    sources = model.weights.sources(decoder_names, files.tensors)
    check_copies(model.weights, files)
    rows = vocab_size_of(read_model(decoder))
    for name, source in sources.items():
        grown = rows if name in ROWS_PER_TOKEN else None
        state[name] = checked(state[name], name, source, files, rows=grown)
    for name, entry in state.items():
        if _is_heard(name) and isinstance(entry, Entry):
            state[name] = with_dtype(entry, heard[name.removeprefix(_PERCEPTION)].dtype)

    def read(name: str) -> Tensor:
        if _is_heard(name):
            found: Tensor = heard[name.removeprefix(_PERCEPTION)]
            return found
        tensor = _read(sources[name], files)
        return with_rows(tensor, vocab_size_of(model), new_ids) if name in ROWS_PER_TOKEN else tensor

    with whole_directory(output) as folder:
        made_by = f"{encoder.source.name} and {decoder.name}; made by examples/assemble.py."
        write_side_files(decoder, folder, model, tokenizer, made_by)
        (folder / CHECKPOINT).mkdir()
        save_streamed(state, read, folder / CHECKPOINT)
        (folder / CHECKPOINT / TRAINER_STATE).write_text("{}\n")
    projector = sum(value.numel() for name, value in heard.items() if "proj" in name.partition(".")[0])
    return Assembled(
        sample_rate=encoder.sample_rate,
        new_tokens=tuple(tokenizer.convert_ids_to_tokens(new_ids)),
        end_of_turn=str(tokenizer.eos_token),
        encoder_parameters=sum(parameter.numel() for parameter in perception.parameters()) - projector,
        projector_parameters=projector,
    )


def _grown(decoder: Path, encoder: Encoder) -> tuple[HfModel, PreTrainedTokenizerBase, list[int]]:
    """The policy from decoder and encoder, the tokenizer with audio tokens, and their ids."""
    model = read_model(decoder)
    if model.has_perception:
        raise ValueError(f"{decoder} has an encoder of its own; import it with examples/import_hf.py")
    tokenizer = load_tokenizer(decoder)
    known = vocab_size_of(model)
    if len(tokenizer) > known:
        raise ValueError(
            f"{decoder}: the tokenizer has {len(tokenizer)} tokens, config.json says vocab_size={known}: "
            "take both from one model"
        )
    new_ids = with_audio_tokens(tokenizer)
    rows = max(known, len(tokenizer))
    config = ModelConfig(perception=encoder.perception, decoder=replace(model.config.decoder, vocab_size=rows))
    grown = replace(model, config=config, has_perception=True, sample_rate=encoder.sample_rate)
    return grown, tokenizer, new_ids


def with_rows(
    rows: Float[Tensor, "tokens hidden"], count: int, new_ids: Sequence[int]
) -> Float[Tensor, "more_tokens hidden"]:
    """Adds rows for new tokens; each new row is the mean over the model's existing tokens.

    This also holds if the model already had rows with these ids as vocabulary padding.
    """
    known = rows[: min([*new_ids, len(rows)])]
    mean = known.double().mean(0).to(rows.dtype)
    grown = torch.cat([rows, mean.expand(count - len(rows), -1)])
    grown[list(new_ids)] = mean
    return grown


def _read(source: Source, files: ModelFiles) -> Tensor:
    return source.layout.fuse([files.read(theirs) for theirs in source.theirs])


def write_side_files(
    decoder: Path, folder: Path, model: HfModel, tokenizer: PreTrainedTokenizerBase, made_by: str
) -> None:
    """Write tokenizer, config, and `original`: the decoder's side files with the model's vocabulary and perception."""
    original = folder / ORIGINAL
    original.mkdir()
    for path in side_files(decoder):
        shutil.copy2(path, original / path.name)
    values = json.loads((original / "config.json").read_text())
    values["vocab_size"] = vocab_size_of(model)
    (original / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    perception = json.dumps(asdict(model.config)["perception"], indent=2)
    (original / PERCEPTION_CONFIG).write_text(perception + "\n")
    for target in (original, folder / TOKENIZER):
        tokenizer.save_pretrained(str(target))
    write_model_config(folder, model, made_by)


def vocab_size_of(model: HfModel) -> int:
    """Rows of the model's embedding."""
    size = model.config.decoder.vocab_size
    assert size is not None, "config.json says it"
    return size


def _is_heard(name: str) -> bool:
    return name.startswith(_PERCEPTION)
