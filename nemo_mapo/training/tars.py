"""TARS (arXiv 2601.05543): speech-conditioned completions are rewarded for resembling right text-conditioned ones.

Half of a prompt's completions hear the clip; the other half read its caption instead. Each half is a group of its own:
advantages are centred per modality, and a completion is sampled, scored and trained with one and the same prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.rewards import TarsConfig
from nemo_mapo.data.prompts import encode_prompt
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.hidden_states import pooled_hidden_states
from nemo_mapo.models.layout import MicroBatching, in_parts
from nemo_mapo.ranks import any_rank
from nemo_mapo.rewards.judge import EmbeddingModel, JudgeError
from nemo_mapo.rewards.judged import RewardsUnavailable
from nemo_mapo.rows import Group, Problem, Prompt, Row, completions_of, training_rows
from nemo_mapo.types import Example, Wording

MODALITIES = 2
"""Groups of a prompt: speech, then text."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """What TARS adds to the rewards; 0 for text-conditioned completions and if there is no reference."""

    reward: Float[Tensor, " batch"]
    metrics: dict[str, float]


def with_text_twins(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, wording: Wording) -> list[Problem]:
    """Every problem twice in succession: with its clip, and with the clip's caption instead.

    ValueError naming a question without a caption.
    """
    return [twin for problem in problems for twin in (problem, _text_twin(problem, tokenizer, wording))]


def _text_twin(problem: Problem, tokenizer: PreTrainedTokenizerBase, wording: Wording) -> Problem:
    example = problem.example
    if example.caption is None:
        raise ValueError(
            f"{example.id}: field 'caption' is missing: TARS gives it to the text-conditioned completions in place of "
            "the clip; add it to the manifest"
        )
    told = Example(
        id=example.id,
        question=f"{example.caption} {example.question}",
        choices=example.choices,
        answer=example.answer,
        task=example.task,
    )
    prompt = Prompt(id=example.id, token_ids=torch.tensor(encode_prompt(told, 0, tokenizer, wording)))
    return Problem(prompt=prompt, example=example)


def alignment(
    groups: Sequence[Group],
    accuracy: Sequence[float],
    policy: AudioLLM,
    config: TarsConfig,
    *,
    batching: MicroBatching,
    embedder: EmbeddingModel | None,
) -> Alignment:
    """alpha R_rep + beta R_beh of the speech-conditioned completions.

    R_rep: mean over all decoder layers of the cosine between the mean hidden states, over generated tokens, of the
    completion and of its reference. R_beh: cosine of their texts' embeddings. The reference is a random right
    text-conditioned completion of the same question; a question without one gives 0 to all, and is counted in
    `rollout/tars_without_reference`.

    Raises:
        ValueError: the model is sharded so that no rank sees all layers and positions.
        RewardsUnavailable: the embedding model cannot be reached.
    """
    speech, reference, without = _pairs(groups, accuracy)
    texts = [one.text for one in completions_of(groups)]
    reward = torch.zeros(len(texts))
    modality = torch.tensor([number % MODALITIES for number, group in enumerate(groups) for _ in group.completions])
    right = torch.tensor(accuracy)
    metrics = {
        "rollout/tars_without_reference": without,
        "rollout/accuracy_speech": float(right[modality == 0].mean()),
        "rollout/accuracy_text": float(right[modality == 1].mean()),
    }
    # The layers' experts may be sharded over ranks: none can make this pass alone.
    if config.representation > 0 and any_rank(bool(speech)):
        states = _states(policy, training_rows(groups), batching)
        cosines = torch.cosine_similarity(states[speech], states[reference], dim=-1).mean(-1)
        reward[speech] += config.representation * cosines
        if speech:
            metrics["rollout/tars_representation"] = float(cosines.mean())
    if config.behaviour > 0:
        assert embedder is not None, "the config requires one"
        cosines = _text_cosines(texts, speech, reference, embedder)
        reward[speech] += config.behaviour * cosines
        if speech:
            metrics["rollout/tars_behaviour"] = float(cosines.mean())
    return Alignment(reward=reward, metrics=metrics)


def _pairs(groups: Sequence[Group], accuracy: Sequence[float]) -> tuple[list[int], list[int], float]:
    """Rows of speech-conditioned completions, the row of the reference of each, and the share of questions without."""
    group = len(groups[0])
    speech: list[int] = []
    reference: list[int] = []
    questions = len(groups) // MODALITIES
    for question in range(questions):
        first = question * MODALITIES * group
        right = [row for row in range(first + group, first + 2 * group) if accuracy[row] == 1.0]
        if right:
            # The same in every layout and after a restart.
            asked = groups[question * MODALITIES]
            rng = np.random.default_rng([asked.completions[0].weight_version, *asked.example.id.encode()])
            speech += range(first, first + group)
            reference += [right[int(rng.integers(len(right)))]] * group
    return speech, reference, 1 - len(speech) / (questions * group)


@torch.no_grad()
def _states(policy: AudioLLM, rows: Sequence[Row], batching: MicroBatching) -> Float[Tensor, "batch layer hidden"]:
    """Mean hidden state of every layer over the completion's tokens, row by row."""
    found = []
    for part in in_parts(rows, batching.rows):
        inputs = MicroBatching(rows=batching.rows).lay_out(part, policy)
        written = torch.zeros_like(inputs.tokens, dtype=torch.bool)
        for span in inputs.spans:
            # From y_1 on, which stands behind the position that predicts it.
            written.view(-1)[span.first + 1 : span.first + 1 + span.tokens] = True
        with pooled_hidden_states(policy, written) as pooled:
            inputs.call(policy, None)
        found.append(torch.stack(pooled, dim=1).cpu())
    return torch.cat(found)


def _text_cosines(
    texts: Sequence[str], speech: Sequence[int], reference: Sequence[int], embedder: EmbeddingModel
) -> Float[Tensor, " pair"]:
    """One cosine per pair; RewardsUnavailable on all ranks if any of them gets no embeddings."""
    needed = list(dict.fromkeys(texts[row] for row in (*speech, *reference)))
    failure: JudgeError | None = None
    vectors: dict[str, Tensor] = {}
    try:
        if needed:
            vectors = dict(zip(needed, torch.tensor(embedder.embed(needed), dtype=torch.float32), strict=True))
    except JudgeError as error:
        failure = error
    if any_rank(failure is not None):
        reason = "another rank got none; its message says why" if failure is None else str(failure)
        raise RewardsUnavailable(f"TARS needs embeddings of the completions: {reason}") from failure
    if not needed:
        return torch.zeros(0)
    first, second = (torch.stack([vectors[texts[row]] for row in rows]) for rows in (speech, reference))
    return torch.cosine_similarity(first, second, dim=-1)
