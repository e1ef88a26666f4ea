"""Grounding analysis of a checkpoint: where it listens, and how much of its score depends on the audio."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nemo_mapo.attention.session import HeadReduction
from nemo_mapo.config.analysis import AnalysisConfig
from nemo_mapo.config.rewards import RewardsConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.data.prompts import prefill
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.evaluation.evaluate import waveforms
from nemo_mapo.evaluation.grounding.causal import (
    INTERVENTIONS,
    LATE,
    belief_parts,
    belief_rows,
    parts_of,
    truth_probabilities,
)
from nemo_mapo.evaluation.grounding.collapse import collapse_index
from nemo_mapo.evaluation.grounding.controls import (
    exchanged,
    never_alone,
    refuse_several_clips,
    silenced,
    text_only,
)
from nemo_mapo.evaluation.grounding.effects import DIGITS, Effects, masking
from nemo_mapo.evaluation.grounding.evidence import SELECTIONS, silence_frames
from nemo_mapo.evaluation.grounding.lengths import length_effect
from nemo_mapo.evaluation.grounding.listening import Listening, listen
from nemo_mapo.evaluation.profile import PositionProfile
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.pos_gate.gate import pos_token_gate, pos_token_tags
from nemo_mapo.pos_gate.tagger import UNIVERSAL_TAGS, Tagger
from nemo_mapo.rollout.deaf import DeafTokens
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rows import Group, Problem, TokenSignals, completions_of, training_rows
from nemo_mapo.training.references import FrozenReference
from nemo_mapo.training.scoring import score_groups
from nemo_mapo.training.signals import token_signals_in_parts
from nemo_mapo.types import Wording

NO_WORD = "(mark)"
"""Tag of tokens that are not part of a word: markup, punctuation, end of turn."""
_WORDS = UNIVERSAL_TAGS - {"."}

EXAMPLES = 6
"""Number of questions whose answers and clips are kept for the page."""

Scores = list[float]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The policy to analyse, and everything needed to query it."""

    policy: AudioLLM
    backend: MegatronRollout
    reference: FrozenReference
    tokenizer: PreTrainedTokenizerBase
    tagger: Tagger
    rewards: RewardsConfig
    sampling: SamplingConfig
    """As in training; greedy decoding keeps its length limits."""
    wording: Wording
    """As in training."""
    completions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By question and choice, from manifests that have them (docs/data.md): one text per choice, for `belief_rows`."""

    @property
    def special(self) -> SpecialTokens:
        """The tokenizer's special tokens."""
        return SpecialTokens.from_tokenizer(self.tokenizer)

    def ask(self, problems: Sequence[Problem], deaf: DeafTokens | None = None) -> list[Group]:
        """Greedy answers to problems, with or without `deaf` tokens."""
        prompts, seeds = [problem.prompt for problem in problems], torch.zeros(len(problems), dtype=torch.int64)
        drawn = self.backend.generate(prompts, self.sampling.greedy, group_size=1, seeds=seeds, deaf=deaf)
        return [problem.answered(completions) for problem, completions in zip(problems, drawn, strict=True)]

    def correct(self, groups: Sequence[Group]) -> Scores:
        """1 for each right answer, 0 for the others."""
        return score_groups(groups, self.rewards.accuracy_only).accuracy

    def signals(self, groups: Sequence[Group], reduction: HeadReduction | None = None) -> list[TokenSignals]:
        """The policy's signals for every token of the answers."""
        batching = self.reference.batching
        return token_signals_in_parts(self.policy, training_rows(groups), head_reduction=reduction, batching=batching)


@dataclass
class Found:
    """Results collected while batches are analysed; lists run over questions in their order."""

    ids: list[str] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    """Answers to the first questions, by condition."""
    clips: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)
    """By question, of the examples."""
    chances: list[float] = field(default_factory=list)
    """Accuracy of guessing, by question."""
    accuracy: defaultdict[str, Scores] = field(default_factory=lambda: defaultdict(list))
    """By condition: full, text_only, silence, exchanged, and `<selection> <ratio>` for evidence masking."""
    truth: defaultdict[str, Scores] = field(default_factory=lambda: defaultdict(list))
    """Probability of the right choice by condition or intervention; NaN for a question without one."""
    without_late_part: int = 0
    """Completions without late tokens."""
    collapse: list[float] = field(default_factory=list)
    by_tag: defaultdict[str, list[tuple[float, float, float]]] = field(default_factory=lambda: defaultdict(list))
    """Policy entropy, delta h and audio mass of every token, by part of speech."""
    untagged: int = 0
    """Completions whose tokens could not be aligned with their text, and so have no parts of speech."""
    profile: PositionProfile = field(default_factory=PositionProfile)
    head_mass: Tensor | None = None
    """Sum over tokens, [layer, head]."""
    lengths: list[list[int]] = field(default_factory=list)
    length_scores: list[Scores] = field(default_factory=list)
    finished: list[list[bool]] = field(default_factory=list)


@torch.no_grad()
def analyse(
    subject: Subject, batches: Iterable[list[Problem]], config: AnalysisConfig
) -> tuple[dict[str, Any], dict[str, list[NDArray[np.float32]]]]:
    """Analyse the batches; return the analysis file's content (docs/grounding.md) and the examples' clips by question.

    Raises:
        ValueError: the model is sharded over ranks, or a batch's clips cannot be exchanged.
    """
    found = Found()
    subject.policy.eval()
    for problems in tqdm(never_alone(batches), desc="grounding analysis", unit="batch", dynamic_ncols=True):
        _analyse_batch(problems, subject, config, found)
    return _results(subject, config, found), found.clips


def _analyse_batch(problems: Sequence[Problem], subject: Subject, config: AnalysisConfig, found: Found) -> None:
    refuse_several_clips(problems)
    found.ids += [problem.example.id for problem in problems]
    found.chances += [1 / len(problem.example.choices) for problem in problems]
    groups = subject.ask(problems)
    listening = listen(subject.policy, training_rows(groups), rows_at_a_time=subject.reference.batching.rows)
    found.accuracy["full"] += subject.correct(groups)
    heard = {
        "silence": silenced(problems),
        "text_only": text_only(problems, subject.special),
        "exchanged": exchanged(problems, subject.tokenizer, subject.policy.num_audio_tokens, subject.wording),
    }
    for ratio in config.ratios:
        for selection in SELECTIONS:
            heard[masking(selection, ratio)] = silence_frames(problems, listening, ratio, selection, seed=config.seed)
    answers = {"full": groups} | {name: subject.ask(changed) for name, changed in heard.items()}
    for name in heard:
        found.accuracy[name] += subject.correct(answers[name])
    others = {name: heard[name] for name in ("silence", "exchanged")}
    add_causal(problems, others, groups, subject, config, found)
    _add_examples(problems, answers, found)
    _add_signals(groups, listening, subject, found)
    _add_lengths(problems, subject, config, found)


def _add_examples(problems: Sequence[Problem], answers: dict[str, list[Group]], found: Found) -> None:
    """Keep the answers to the first questions, right or wrong, and their clips."""
    first = len(found.accuracy["full"]) - len(problems)
    for row, problem in enumerate(problems[: EXAMPLES - len(found.examples)]):
        example = problem.example
        said = [
            {
                "heard": name,
                "text": answers[name][row].completions[0].text,
                "correct": found.accuracy[name][first + row],
            }
            for name in ("full", "exchanged", "silence", "text_only")
        ]
        found.examples.append(
            {"id": example.id, "question": example.question, "choices": list(example.choices),
             "answer": example.answer, "said": said}
        )  # fmt: skip
        found.clips[example.id] = waveforms(problem.prompt)


def add_causal(
    problems: Sequence[Problem],
    heard: Mapping[str, Sequence[Problem]],
    own: Sequence[Group],
    subject: Subject,
    config: AnalysisConfig,
    found: Found,
) -> None:
    """Ask again with the audio blocked for some tokens, and score each choice's completion the same way."""
    tokenizer, layers = subject.tokenizer, _layers(subject)
    said = [one.token_ids.tolist() for one in completions_of(own)]
    parts = parts_of(said, tokenizer, config.late_after)
    found.without_late_part += sum(late >= len(ids) for late, ids in zip(parts.late_from.tolist(), said, strict=True))
    rows = belief_rows(own, subject.completions, subject.rewards.template, tokenizer)
    believed = belief_parts(rows, tokenizer, config.late_after)

    def truth(asked: Sequence[Problem], deaf: DeafTokens | None = None) -> Scores:
        prompts, batching = [problem.prompt for problem in asked], subject.reference.batching
        return truth_probabilities(subject.policy, prompts, rows, batching=batching, deaf=deaf).tolist()

    for name, asked in {"full": problems, **heard}.items():
        found.truth[name] += truth(asked)
    for name in INTERVENTIONS:
        found.accuracy[name] += subject.correct(subject.ask(problems, parts.deaf(name, layers)))
        found.truth[name] += truth(problems, believed.deaf(name, layers))


def _add_signals(groups: Sequence[Group], listening: Sequence[Listening], subject: Subject, found: Found) -> None:
    text_entropy = subject.reference.text_entropy(training_rows(groups))
    for group, heard, signals, unheard in zip(groups, listening, subject.signals(groups), text_entropy, strict=True):
        delta_h = unheard - signals.entropy_nats
        mass = heard.mass.amax(dim=1).mean(dim=0)
        curves = {"audio_mass_max": mass, "audio_mass_mean": heard.mass.mean(dim=(0, 1)), "delta_h_nats": delta_h,
                  "policy_entropy_nats": signals.entropy_nats}  # fmt: skip
        by_layer = zip(_layers(subject), heard.mass.amax(dim=1), strict=True)
        found.profile.add(curves | {f"layer_{layer}": values for layer, values in by_layer})
        summed = heard.mass.sum(dim=2).double()
        found.head_mass = summed if found.head_mass is None else found.head_mass + summed
        found.collapse.append(collapse_index(mass))
        _add_tags(group, torch.stack([signals.entropy_nats, delta_h, mass], dim=-1), subject, found)


def _add_tags(group: Group, values: Float[Tensor, "time signal"], subject: Subject, found: Found) -> None:
    """Of a greedy answer, the only completion of its group."""
    start, (completion,) = prefill(group.prompt.token_ids.tolist(), subject.tokenizer), group.completions
    ids = [*start, *completion.token_ids.tolist()]
    tags = pos_token_tags(ids, subject.tokenizer, subject.tagger)[len(start) :]
    if not any(tags) and _misaligned(ids, subject):
        found.untagged += 1
        return
    for tag, (entropy, delta_h, mass) in zip(tags, values.tolist(), strict=True):
        found.by_tag[tag or NO_WORD].append((entropy, delta_h, mass))


def _misaligned(ids: Sequence[int], subject: Subject) -> bool:
    """Whether a completion has no tags because its tokens do not align with its text, not because it has no words."""
    return pos_token_gate(ids, subject.tokenizer, _WORDS, subject.tagger).fallback == "misaligned"


def _add_lengths(problems: Sequence[Problem], subject: Subject, config: AnalysisConfig, found: Found) -> None:
    group = config.samples_per_item
    first = len(found.lengths) * group
    seeds = config.seed * 2**32 + first + torch.arange(len(problems) * group)
    prompts = [problem.prompt for problem in problems]
    drawn = subject.backend.generate(prompts, subject.sampling, group_size=group, seeds=seeds)
    for problem, completions in zip(problems, drawn, strict=True):
        found.lengths.append(list(map(len, completions)))
        found.length_scores.append(subject.correct([problem.answered(completions)]))
        found.finished.append([one.stopped for one in completions])


def _results(subject: Subject, config: AnalysisConfig, found: Found) -> dict[str, Any]:
    effects = Effects(scores=found.accuracy, config=config)
    plain = ("full", "text_only", "silence", "exchanged")
    assert found.head_mass is not None
    tokens = float(found.profile.count.sum())
    return {
        "items": len(found.ids),
        "ids": found.ids,
        "chance": _mean(found.chances),
        "examples": found.examples,
        "settings": asdict(config),
        "pos_tagger": subject.tagger.name,
        "accuracy": {name: effects.accuracy(name) for name in plain},
        "accuracy_lost": {name: effects.lost("full", name) for name in plain[1:]},
        "profile": found.profile.record(0, "analysis"),
        "heads": {
            "layers": list(_layers(subject)),
            "audio_mass": [[round(value / tokens, DIGITS) for value in row] for row in found.head_mass.tolist()],
        },
        "collapse": _collapse(found, config.collapse_threshold),
        "untagged_completions": found.untagged,
        "parts_of_speech": [_tag_row(tag, values) for tag, values in sorted(found.by_tag.items())],
        "causal": _causal(effects, config, found),
        "evidence": effects.evidence(),
        "acs": effects.acs(),
        "length": asdict(length_effect(found.lengths, found.length_scores, found.finished)),
        "scores": dict(found.accuracy),
    }


def _causal(effects: Effects, config: AnalysisConfig, found: Found) -> dict[str, Any]:
    """Accuracy and probability of the truth by intervention, and the paired loss relative to no intervention."""
    known = [index for index, value in enumerate(found.truth["full"]) if math.isfinite(value)]
    truth = Effects(scores={name: [values[i] for i in known] for name, values in found.truth.items()}, config=config)
    conditions = list(found.truth) if known else []
    return {
        "without_late_part": found.without_late_part,
        "accuracy": {name: effects.accuracy(name) for name in INTERVENTIONS},
        "lost": {name: effects.lost("full", name) for name in INTERVENTIONS},
        "late_listening_used": effects.lost("full", LATE),
        "truth_questions": len(known),
        "truth": {name: truth.accuracy(name) for name in conditions},
        "truth_lost": {name: truth.lost("full", name) for name in conditions if name != "full"},
    }


def _collapse(found: Found, threshold: float) -> dict[str, Any]:
    """Share of completions above the threshold, and accuracy on either side; those without an index are left out."""
    pairs = [
        (index, score)
        for index, score in zip(found.collapse, found.accuracy["full"], strict=True)
        if math.isfinite(index)
    ]
    collapsed = [score for index, score in pairs if index > threshold]
    others = [score for index, score in pairs if index <= threshold]
    return {
        "threshold": threshold,
        "completions": len(pairs),
        "without_index": len(found.collapse) - len(pairs),
        "mean_index": _mean([index for index, _ in pairs]),
        "share": _mean([float(index > threshold) for index, _ in pairs]),
        "accuracy_collapsed": _mean(collapsed),
        "accuracy_others": _mean(others),
    }


def _tag_row(tag: str, values: list[tuple[float, float, float]]) -> dict[str, Any]:
    entropy, delta_h, mass = (_mean(list(column)) for column in zip(*values, strict=True))
    return {"tag": tag, "tokens": len(values), "entropy_nats": entropy, "delta_h_nats": delta_h, "audio_mass": mass}


def _layers(subject: Subject) -> tuple[int, ...]:
    return subject.policy.session.target_layers


def _mean(values: Sequence[float]) -> float | None:
    """None if there is nothing to average."""
    return round(sum(values) / len(values), DIGITS) if values else None
