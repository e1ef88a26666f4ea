"""Conversations as NeMo's SALM reads them: a user's text and clips, and an assistant's answer, become one question."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lhotse.cut import Cut
from nemo.collections.common.data.lhotse.text_adapters import (
    AudioTurn,
    NeMoMultimodalConversation,
    NeMoMultimodalConversationJsonlAdapter,
)

from nemo_mapo.config.input_cfg import Source
from nemo_mapo.data.archives import headers_of
from nemo_mapo.data.entries import Entry, lines_of, manifest_files, seconds_of
from nemo_mapo.data.importers.choices import split_options
from nemo_mapo.data.sources import refuse_unsafe_path
from nemo_mapo.rewards.answers import resolve_choice

Turn = dict[str, Any]
_PLACEHOLDER = "[audio]"
"""Default of `audio_locator_tag` for an item without one."""
_BESIDE_AUDIO = frozenset({".json", ".nodata", ".nometa"})
"""Members that Lhotse writes beside the audio."""


def question_fields(record: dict[str, Any], where: str, locator: str) -> dict[str, Any]:
    """The fields of the question in a conversation: the user's texts, the assistant's answer, and the rest.

    Choices are the line's `choices`, or those listed in the user's text if the answer is one of them; otherwise there
    are none, which supervised training accepts.

    Raises:
        ValueError: not one turn of an assistant with text after the user's, or no clip.
    """
    turns = _turns(record, where)
    asked, answered = turns[:-1], turns[-1]
    if _role(answered) != "assistant" or answered["type"] != "text" or any(_role(turn) != "user" for turn in asked):
        form = ", ".join(f"{_role(turn)} {turn['type']}" for turn in turns)
        raise ValueError(
            f"{where}: turns are {form}: a question here is one or more turns of a user, then one text of an assistant"
        )
    if not any(turn["type"] == "audio" for turn in asked):
        raise ValueError(f"{where}: no turn with audio: every question here is about a clip")
    text = "\n".join(turn["value"].replace(locator, "").strip() for turn in asked if turn["type"] == "text").strip()
    fields = {key: value for key, value in record.items() if key not in ("id", "conversations")}
    fields |= {"question": text, "answer": answered["value"].strip()}
    if fields.get("choices") is None:
        question, choices = split_options(text)
        chosen = resolve_choice(fields["answer"], choices) if len(choices) > 1 else None
        if chosen is not None:
            fields |= {"question": question, "choices": list(choices), "answer": choices[chosen]}
    return fields


def conversation_entries(source: Source) -> Iterator[Entry]:
    """The lines of conversation manifests, one question each; ValueError if an archive lacks a clip."""
    for manifest, archive in _shards(source.item, source.where):
        headers = None if archive is None else headers_of(archive, no_audio=_BESIDE_AUDIO)
        for place, record in lines_of(manifest):
            if not isinstance(name := record.get("id"), str):
                raise ValueError(f"{place}: field 'id' is {name!r}: every conversation needs a text id")
            where = f"{place}: cut {name}"
            fields = question_fields(record, where, _locator(source.item))
            clips = []
            for number, turn in enumerate(_audio_turns(record, where), start=1):
                if headers is not None and turn["value"] not in headers:
                    raise ValueError(f"{where}: {turn['value']} not in {archive}: write the archive again")
                clips.append(
                    Entry(
                        where=where if number == 1 else f"{where}: clip {number}",
                        id=name,
                        fields=fields,
                        start_seconds=0.0,
                        duration_seconds=seconds_of(turn, "duration", where),
                        sample_rate=None,
                        channels=1,
                        audio=manifest.parent / turn["value"] if headers is None else None,
                        header=None if headers is None else headers[turn["value"]],
                        archived=f"{turn['value']} in {archive}",
                    )
                )
            yield replace(clips[0], further=tuple(clips[1:]))


def conversation_cuts(item: dict[str, Any], *, shuffle: bool, seed: int) -> Iterator[Cut]:
    """Read conversations through NeMo's adapter; each becomes the cut of its first clip, with the others in `audio_2` …

    Lines are checked before NeMo opens a file that they name.
    """
    shards = _shards(item, "input_cfg")
    if shuffle:
        random.Random(seed).shuffle(shards)
    for manifest, archive in shards:
        adapter = NeMoMultimodalConversationJsonlAdapter(
            manifest_filepath=[str(manifest)],
            tarred_audio_filepaths=None if archive is None else [str(archive)],
            audio_locator_tag=_locator(item),
        )
        read = iter(adapter)
        for place, record in lines_of(manifest):
            fields = question_fields(record, place, _locator(item))
            _audio_turns(record, place)
            yield _cut(_next(read, place, archive), fields)


def _next(read: Iterator[NeMoMultimodalConversation], place: str, archive: Path | None) -> NeMoMultimodalConversation:
    try:
        return next(read)
    except (AssertionError, StopIteration) as error:
        raise ValueError(f"{place}: archive {archive} does not hold what the line says: {error}") from error


def _cut(conversation: NeMoMultimodalConversation, fields: dict[str, Any]) -> Cut:
    first, *others = (turn.cut for turn in conversation.turns if isinstance(turn, AudioTurn))
    cut = first.with_id(conversation.id)
    cut.custom = {**fields, **{f"audio_{number}": clip.recording for number, clip in enumerate(others, start=2)}}
    return cut


def _shards(item: Any, where: str) -> list[tuple[Path, Path | None]]:
    """Manifests and their archives, in the order in which NeMo pairs them."""
    manifests = manifest_files(item["manifest_filepath"], where, "manifest_filepath")
    if item.get("tarred_audio_filepaths") is None:
        return [(manifest, None) for manifest in manifests]
    archives = manifest_files(item["tarred_audio_filepaths"], where, "tarred_audio_filepaths")
    if len(manifests) != len(archives):
        raise ValueError(f"{where}: {len(manifests)} manifests and {len(archives)} archives: give one for each")
    return list(zip(manifests, archives, strict=True))


def _turns(record: dict[str, Any], where: str) -> list[Turn]:
    turns = record.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2:
        raise ValueError(f"{where}: field 'conversations' is {turns!r}: give at least two turns")
    for turn in turns:
        texts = isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("value", "from", "type"))
        if not texts or turn["type"] not in ("text", "audio"):
            raise ValueError(
                f"{where}: turn {turn!r}: give texts for value, from (User, Assistant), type (text, audio)"
            )
    return turns


def _audio_turns(record: dict[str, Any], where: str) -> list[Turn]:
    turns = [turn for turn in _turns(record, where) if turn["type"] == "audio"]
    for turn in turns:
        refuse_unsafe_path(turn["value"], where)
    return turns


def _role(turn: Turn) -> str:
    return str(turn["from"]).lower()


def _locator(item: Any) -> str:
    return str(item.get("audio_locator_tag", _PLACEHOLDER))
