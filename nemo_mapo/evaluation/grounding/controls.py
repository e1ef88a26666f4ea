"""The same questions with the audio taken away, silenced, or exchanged: how much of the score depends on it."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from nemo_mapo.data.dataset import AudioTokenCount
from nemo_mapo.data.prompts import drop_audio_span, encode_prompt
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.types import AudioBatch, PromptBatch, Wording


def never_alone(batches: Iterable[PromptBatch], pad_id: int) -> Iterator[PromptBatch]:
    """The same prompts in the same order, in batches of at least two: a lone one has no clip to exchange with.

    What is left over at the end joins the batch before it.
    """
    ready: PromptBatch | None = None
    held: PromptBatch | None = None
    for batch in batches:
        held = batch if held is None else joined(held, batch, pad_id)
        if len(held) > 1:
            if ready is not None:
                yield ready
            ready, held = held, None
    if held is not None:
        ready = held if ready is None else joined(ready, held, pad_id)
    if ready is not None:
        yield ready


def joined(first: PromptBatch, second: PromptBatch, pad_id: int) -> PromptBatch:
    """The prompts of two batches, every one with its own clip, as one batch."""
    clips = len(first.audio.lengths)
    return PromptBatch(
        tokens=_stacked(first.tokens, second.tokens, pad_id),
        lengths=torch.cat([first.lengths, second.lengths]),
        audio=AudioBatch(
            waveforms=_stacked(first.audio.waveforms, second.audio.waveforms, 0),
            lengths=torch.cat([first.audio.lengths, second.audio.lengths]),
        ),
        audio_row=torch.cat([first.audio_row, torch.where(second.audio_row < 0, -1, second.audio_row + clips)]),
        examples=first.examples + second.examples,
    )


def _stacked(first: torch.Tensor, second: torch.Tensor, padding: int) -> torch.Tensor:
    width = max(first.shape[1], second.shape[1])
    rows = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=padding) for part in (first, second)]
    return torch.cat(rows)


def refuse_several_clips(prompts: PromptBatch) -> None:
    """ValueError naming a prompt with several clips: an exchange or a masked part of them would mean nothing."""
    for row, example in enumerate(prompts.examples):
        if len(clips := prompts.clips(row)) > 1:
            raise ValueError(f"{example.id} has {len(clips)} clips; grounding is analysed for questions about one clip")


def silenced(prompts: PromptBatch) -> PromptBatch:
    """Every clip replaced by silence of its length."""
    silence = AudioBatch(waveforms=torch.zeros_like(prompts.audio.waveforms), lengths=prompts.audio.lengths)
    return replace(prompts, audio=silence)


def text_only(prompts: PromptBatch, special: SpecialTokens) -> PromptBatch:
    """The questions alone: audio span and markers dropped, as the text-only reference reads them."""
    text = drop_audio_span(prompts.tokens, prompts.lengths, special)
    none = AudioBatch(waveforms=prompts.audio.waveforms[:0], lengths=prompts.audio.lengths[:0])
    return PromptBatch(
        tokens=text.tokens,
        lengths=text.lengths,
        audio=none,
        audio_row=torch.full_like(prompts.audio_row, -1),
        examples=prompts.examples,
    )


def exchanged(
    prompts: PromptBatch, tokenizer: PreTrainedTokenizerBase, audio_tokens: AudioTokenCount, wording: Wording
) -> PromptBatch:
    """Every question about the clip of another one, whose answer is another one wherever that can be.

    ValueError if the batch has no clip that differs.
    """
    order = foreign_clips(prompts)
    audio_row = prompts.audio_row[order]
    rows = [
        torch.tensor(encode_prompt(example, audio_tokens(int(prompts.audio.lengths[clip])), tokenizer, wording))
        for example, clip in zip(prompts.examples, audio_row.tolist(), strict=True)
    ]
    changed = PromptBatch(
        tokens=torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=SpecialTokens.from_tokenizer(tokenizer).pad_id
        ),
        lengths=torch.tensor([len(row) for row in rows]),
        audio=prompts.audio,
        audio_row=audio_row,
        examples=prompts.examples,
    )
    refuse_own_clips(prompts, changed)
    return changed


def foreign_clips(prompts: PromptBatch) -> torch.Tensor:
    """For each row the row whose clip it is to hear: a rotation of the rows sorted by answer and clip.

    Of the rotations that give no row its own clip, the one that gives most rows the clip of another answer.
    """
    sounds = [_sound(prompts, row) for row in range(len(prompts))]
    answers = [example.answer for example in prompts.examples]
    ranked = sorted(range(len(prompts)), key=lambda row: (answers[row], sounds[row]))
    best, most = None, -1
    for shift in range(1, len(ranked)):
        pairs = list(zip(ranked, ranked[shift:] + ranked[:shift], strict=True))
        if any(sounds[row] == sounds[other] for row, other in pairs):
            continue
        different = sum(answers[row] != answers[other] for row, other in pairs)
        if different > most:
            best, most = dict(pairs), different
    if best is None:
        raise ValueError(
            f"the {len(prompts)} clips of the batch that begins with {prompts.examples[0].id} cannot be exchanged so "
            "that no question hears its own or one that sounds the same: analyse more items, or set --batch-size higher"
        )
    return torch.tensor([best[row] for row in range(len(prompts))])


def refuse_own_clips(prompts: PromptBatch, changed: PromptBatch) -> None:
    """ValueError naming a question that hears its own clip after the exchange."""
    for row, example in enumerate(prompts.examples):
        if _sound(prompts, row) == _sound(changed, row):
            raise ValueError(f"{example.id} was to hear the clip of another question and hears its own")


def _sound(prompts: PromptBatch, row: int) -> bytes:
    clip = int(prompts.audio_row[row])
    return prompts.audio.waveforms[clip, : int(prompts.audio.lengths[clip])].numpy().tobytes()
