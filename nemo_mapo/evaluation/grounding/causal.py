"""Causal listening: what a model loses when some tokens cannot attend to the audio.

Attention mass says where a model attends, not whether its answer depends on it: evidence also travels in the hidden
states of tokens that listened earlier. So attention is blocked, and the same question is asked again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import MicroBatching
from nemo_mapo.objective.temporal import part_of_token
from nemo_mapo.rewards.templates import Template, join_completion, split_completion
from nemo_mapo.rollout.deaf import DeafTokens
from nemo_mapo.rows import Group, Prompt, Row
from nemo_mapo.training.signals import token_signals_in_parts

LATE, EARLY, COMPLETION, TARGET_LAYERS, ONLY_LATE = (
    "deaf_late",
    "deaf_early",
    "deaf_completion",
    "deaf_target_layers",
    "only_late",
)
INTERVENTIONS = (LATE, EARLY, COMPLETION, TARGET_LAYERS, ONLY_LATE)
"""Which tokens are deaf: late ones; early ones; the whole completion; the whole completion, only in the target layers;
everything except late tokens, including the prompt's text."""
NEVER = 2**31
"""Token index beyond the end of any completion."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Early and late tokens of completions: those before `early_end`, and those from `late_from` on."""

    early_end: Int[Tensor, " row"]
    late_from: Int[Tensor, " row"]
    """The completion's length if it has no late part."""

    def of(self, rows: Sequence[int]) -> "Parts":
        """Those of the given rows, in this order; a row may be repeated."""
        return Parts(early_end=self.early_end[list(rows)], late_from=self.late_from[list(rows)])

    def deaf(self, intervention: str, target_layers: tuple[int, ...]) -> DeafTokens:
        """The tokens that are deaf in one of `INTERVENTIONS`."""
        start, end = torch.zeros_like(self.late_from), torch.full_like(self.late_from, NEVER)
        match intervention:
            case "deaf_late":
                return DeafTokens(first=self.late_from, end=end)
            case "deaf_early":
                return DeafTokens(first=start, end=self.early_end)
            case "deaf_completion":
                return DeafTokens(first=start, end=end)
            case "deaf_target_layers":
                return DeafTokens(first=start, end=end, layers=target_layers)
            case "only_late":
                return DeafTokens(first=start, end=self.late_from, prompt_text=True)
        raise ValueError(f"unknown intervention {intervention!r}; one of {INTERVENTIONS}")


def thirds(lengths: Sequence[int]) -> Parts:
    """Early is the first third of a completion, late the last (`objective.temporal.part_of_token`)."""
    third = [part_of_token(torch.ones(length, dtype=torch.bool), 3) for length in lengths]
    return Parts(
        early_end=torch.tensor([int((one == 0).sum()) for one in third], dtype=torch.int64),
        late_from=torch.tensor([int((one < 2).sum()) for one in third], dtype=torch.int64),
    )


def after_text(completions: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, mark: str) -> Parts:
    """Tokens after the first `mark` of a completion are late, those up to it early; without a mark all are early."""
    ends = []
    for ids in completions:
        end = len(ids)
        for count in range(1, len(ids) + 1):
            if mark in tokenizer.decode(list(ids[:count])):
                end = count
                break
        ends.append(end)
    late_from = torch.tensor(ends, dtype=torch.int64)
    return Parts(early_end=late_from, late_from=late_from)


def parts_of(completions: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, late_after: str | None) -> Parts:
    """Divide completions after the text `late_after`, or into thirds if it is None."""
    if late_after is not None:
        return after_text(completions, tokenizer, late_after)
    return thirds(list(map(len, completions)))


@dataclass(frozen=True, kw_only=True)
class BeliefRows:
    """One completion per choice for some questions: the texts that the probability of the truth compares.

    Texts of one question differ only in the choice that they conclude, so their common part cancels.
    """

    completions: list[list[int]]
    question: list[int]
    """Index of the prompt that each completion answers."""
    truth: list[bool]
    """Whether each completion concludes the right choice."""


def belief_rows(
    own: Sequence[Group],
    given: Mapping[str, Mapping[str, str]],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
) -> BeliefRows:
    """One completion per choice: the manifest's, or the model's own reasoning followed by each choice as its answer.

    A question without given completions is left out if the model's completion departs from the template.

    Raises:
        ValueError: the given completions of a question are not for its choices.
    """
    rows = BeliefRows(completions=[], question=[], truth=[])
    end = SpecialTokens.from_tokenizer(tokenizer).end_id
    for question, group in enumerate(own):
        example, (said,) = group.example, group.completions
        texts = given.get(example.id)
        if texts is None:
            parts = split_completion(said.text, template) if template in ("think", "reasoning") else None
            if parts is None:
                continue
            texts = {choice: join_completion(parts.reasoning, choice, template) for choice in example.choices}
        if set(texts) != set(example.choices):
            raise ValueError(f"{example.id}: completions are given for {sorted(texts)}, choices are {example.choices}")
        for choice in example.choices:
            rows.completions.append([*tokenizer.encode(texts[choice], add_special_tokens=False), end])
            rows.question.append(question)
            rows.truth.append(choice == example.answer)
    return rows


@torch.no_grad()
def truth_probabilities(
    policy: AudioLLM,
    prompts: Sequence[Prompt],
    rows: BeliefRows,
    *,
    batching: MicroBatching,
    deaf: DeafTokens | None = None,
) -> Float[Tensor, " question"]:
    """Teacher-forced probability of the right choice among those of its question; NaN if it has no completions.

    p = exp(L_truth) / sum_c exp(L_c), L_c the summed log-probability of the completion that concludes choice c. No
    sampling: the same weights give the same number. `deaf` is by row of `rows`.
    """
    probabilities = torch.full((len(prompts),), torch.nan, dtype=torch.float64)
    if not rows.question:
        return probabilities
    asked_rows = completion_rows(prompts, rows)
    signals = token_signals_in_parts(policy, asked_rows, head_reduction=None, batching=batching, deaf=deaf)
    totals = torch.stack([one.log_probs.double().sum() for one in signals])
    question, truth = torch.tensor(rows.question), torch.tensor(rows.truth)
    for asked in sorted(set(rows.question)):
        own = question == asked
        probabilities[asked] = totals[own].softmax(0)[truth[own]].sum()
    return probabilities


def completion_rows(prompts: Sequence[Prompt], rows: BeliefRows) -> list[Row]:
    """The prompts with these completions."""
    return [
        Row(prompt=prompts[question], token_ids=torch.tensor(completion))
        for question, completion in zip(rows.question, rows.completions, strict=True)
    ]


def belief_parts(rows: BeliefRows, tokenizer: PreTrainedTokenizerBase, late_after: str | None) -> Parts:
    """Early and late tokens of the completions; those of a question share the division of its right choice."""
    found = parts_of(rows.completions, tokenizer, late_after)
    of_truth = {
        question: row for row, (question, truth) in enumerate(zip(rows.question, rows.truth, strict=True)) if truth
    }
    return found.of([of_truth[question] for question in rows.question])
