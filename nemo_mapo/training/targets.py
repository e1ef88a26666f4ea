"""Targets of supervised training, from the fields of a manifest."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.data import TARGET_FIELDS, TargetConfig
from nemo_mapo.config.warm_start import WarmStartConfig
from nemo_mapo.data.plain_text import control_tokens_in
from nemo_mapo.data.prompts import prefill, without_audio
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.rewards.templates import Template, has_tags, join_completion, opening_tag, split_completion
from nemo_mapo.rows import Problem, Prompt, Row
from nemo_mapo.types import Example


def target_text(example: Example, config: TargetConfig, template: Template) -> str:
    """The completion to learn for an example.

    `reasoning` of the manifest is either the reasoning alone or a whole completion in the tags of `template`. Without
    it the reasoning is written from the caption, or else from the answer, as the config says.

    Raises:
        ValueError: naming the example, the field and the remedy: no field to write a target from, a completion with a
            different answer, or tags that do not match the template.
    """
    if config.form == "plain":
        return example.answer
    if config.form == "verbatim":
        if example.reasoning is None:
            raise ValueError(f"{example.id}: no 'reasoning', which data.target.form=verbatim learns as it is: add it")
        return example.reasoning
    reasoning = _reasoning(example, config)
    if not has_tags(reasoning):
        reasoning = join_completion(reasoning, example.answer, template)
    found = split_completion(reasoning, template)
    if found is None or found.answer != example.answer:
        raise ValueError(
            f"{example.id}: the target {reasoning!r} is not a completion in the tags of rewards.template={template} "
            f"with the answer {example.answer!r}: put only the reasoning into 'reasoning', or a whole completion, or "
            "set rewards.template or data.target.form"
        )
    return reasoning


def _reasoning(example: Example, config: TargetConfig) -> str:
    if example.reasoning is not None:
        return example.reasoning
    written = config.from_answer if example.caption is None else config.from_caption
    if written is None:
        raise ValueError(
            f"{example.id}: neither 'reasoning' nor 'caption', and data.target.from_answer is null: add one of them to "
            "the manifest, give data.target.from_answer a text, or set data.target.form=plain"
        )
    # Not str.format, which would read attributes of its arguments.
    for name in TARGET_FIELDS:
        written = written.replace(f"{{{name}}}", f"\0{name}\0")
    for name in TARGET_FIELDS:
        written = written.replace(f"\0{name}\0", vars(example)[name] or "")
    return written


class TargetRows:
    """Turns problems into rows to learn: `TargetRows(config, "think", tokenizer)(problems)`."""

    def __init__(self, config: TargetConfig, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = config
        self.template = template
        self.tokenizer = tokenizer
        self.special = SpecialTokens.from_tokenizer(tokenizer)

    def __call__(self, problems: Sequence[Problem]) -> list[Row]:
        """Prompt + target rows, in the order of the problems; the end-of-turn token is learned too."""
        return [
            Row(prompt=prompt, token_ids=torch.tensor(self.ids(example, prompt.token_ids.tolist())))
            for prompt, example in ((problem.prompt, problem.example) for problem in problems)
        ]

    def ids(self, example: Example, prompt: Sequence[int]) -> list[int]:
        """Target of one example after `prompt`; a reasoning tag that the prompt already opens is not opened again."""
        text = target_text(example, self.config, self.template)
        if prefill(prompt, self.tokenizer):
            text = text.lstrip().removeprefix(opening_tag(self.template))
        if found := control_tokens_in(text, self.tokenizer):
            raise ValueError(
                f"{example.id}: the target spells the control token {found[0]}, which would be learned as such: remove "
                "it from the manifest (the end of the turn is added here)"
            )
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.special.end_id]


def hide_clips(
    rows: Sequence[Row],
    places: Sequence[int],
    batch_size: int,
    shares: TargetConfig | WarmStartConfig,
    special: SpecialTokens,
) -> list[Row]:
    """A batch's first rows without audio, as the text-only reference reads them, the next with silence for their clips.

    Args:
        rows: this rank's.
        places: where they stand in the batch.
        batch_size: rows of the batch.
        shares: how many are without audio, and how many silent.
        special: the tokenizer's special tokens.
    """
    text_only = round(batch_size * shares.text_only_share)
    hearing = text_only + round(batch_size * shares.silent_clip_share)

    def heard(prompt: Prompt, place: int) -> Prompt:
        if place < text_only:
            return without_audio(prompt, special)
        return prompt.silenced() if place < hearing else prompt

    return [replace(row, prompt=heard(row.prompt, place)) for row, place in zip(rows, places, strict=True)]
