"""Signals of one forward pass for every completion token: log-probability, entropy, audio mass."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from nemo_mapo.attention.session import Deafness, HeadReduction
from nemo_mapo.models.audio_llm import AudioLLM, AudioLLMOutput
from nemo_mapo.models.layout import PADDED_ROWS, MicroBatching, ModelInputs, in_row_order, known_to_all_stages
from nemo_mapo.models.pipeline import forward_all_stages
from nemo_mapo.objective.logprobs import log_probs_and_entropy
from nemo_mapo.rollout.deaf import DeafTokens
from nemo_mapo.rollout.scoring import Drawing, drawn_log_probs
from nemo_mapo.rows import Row, TokenSignals

LOGIT_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
"""Logits upcast together, by kind of device: what stays in a core's cache (1 MiB of float32; measured, see
docs/benchmarks.md), and enough to keep a GPU busy (256 MiB; not measured)."""
FEWEST_ROWS = 2
"""The least that the pass takes at a time."""


def token_signals(
    model: AudioLLM,
    rows: Sequence[Row],
    *,
    head_reduction: HeadReduction | None,
    batching: MicroBatching = PADDED_ROWS,
) -> list[TokenSignals]:
    """Run a model of one pipeline stage on rows; differentiable in log-probability and mass.

    All rows go through together, laid out as `batching` says; `head_reduction` None captures no audio mass.
    """
    inputs = batching.lay_out(rows, model)
    return read_signals(model, inputs.call(model, head_reduction), inputs)


def read_signals(model: AudioLLM, output: AudioLLMOutput, inputs: ModelInputs) -> list[TokenSignals]:
    """Signals of a forward pass by row, on the last pipeline stage; equal on all tensor-parallel ranks."""
    log_probs, entropy = log_probs_and_entropy(
        output.logits,
        inputs.targets,
        chunk_size=max(FEWEST_ROWS, LOGIT_CHUNK_ELEMENTS[output.logits.device.type] // output.logits.shape[-1]),
        process_group=model.tensor_group,
        vocab_start=model.vocab_start,
    )
    read = {"log_probs": log_probs, "entropy_nats": entropy}
    if output.audio_mass is not None:
        read["audio_mass"] = output.audio_mass
    by_row = zip(*map(inputs.by_row, read.values()), strict=True)
    return [TokenSignals(**dict(zip(read, values, strict=True))) for values in by_row]


@torch.no_grad()
def token_signals_in_parts(
    model: AudioLLM,
    rows: Sequence[Row],
    *,
    head_reduction: HeadReduction | None,
    batching: MicroBatching,
    drawing: Drawing | None = None,
    deaf: DeafTokens | None = None,
) -> list[TokenSignals]:
    """`token_signals` without gradient, part by part, through all pipeline stages and known on all of them.

    With `drawing` the log-probs of the distribution that it draws from are among them. The tokens of `deaf`, given by
    row, are predicted without attention to the audio.
    """

    def read(numbers: list[int]) -> list[TokenSignals]:
        part = [rows[number] for number in numbers]
        inputs = batching.lay_out(part, model)
        blocked = None if deaf is None else deafness(deaf.of(numbers), inputs, model)
        output = inputs.call(partial(forward_all_stages, model, deaf=blocked), head_reduction)
        found = None
        if output is not None:
            found = read_signals(model, output, inputs)
            if drawing is not None:
                tokens = [row.token_ids.to(model.device) for row in part]
                drawn = drawn_log_probs(model, inputs.by_row(output.logits), tokens, drawing)
                found = [replace(one, drawn_log_probs=values) for one, values in zip(found, drawn, strict=True)]
        return on_all_stages(found, part, model, mass=head_reduction is not None, drawn=drawing is not None)

    parts = batching.split(rows)
    return in_row_order(parts, map(read, parts))


def on_all_stages(
    read: Sequence[TokenSignals] | None, rows: Sequence[Row], model: AudioLLM, *, mass: bool, drawn: bool = False
) -> list[TokenSignals]:
    """Signals of some rows on the CPU of every pipeline stage, without gradient; all but the last give None."""
    asked = {"log_probs": True, "entropy_nats": True, "audio_mass": mass, "drawn_log_probs": drawn}
    names = [name for name, wanted in asked.items() if wanted]
    stacked = None
    if read is not None:
        stacked = [torch.stack([vars(one)[name] for name in names]) for one in read]
    known = known_to_all_stages(stacked, rows, model, len(names))
    return [TokenSignals(**dict(zip(names, values, strict=True))) for values in known]


def deafness(deaf: DeafTokens, inputs: ModelInputs, model: AudioLLM) -> Deafness:
    """The positions that predict deaf tokens, which are given by row, and with `prompt_text` the text before them."""
    shared = inputs.positions is not None
    assert deaf.text_rows is None or not shared, "a shared prompt is deaf to all of its completions or to none"
    queries = torch.zeros_like(inputs.tokens, dtype=torch.bool)
    flat = queries.view(-1)
    for row, span in enumerate(inputs.spans):
        first, end = int(deaf.first[row]), min(int(deaf.end[row]), span.tokens)
        flat[span.first + first : span.first + end] = True
        if deaf.prompt_text and (deaf.text_rows is None or bool(deaf.text_rows[row])):
            flat[span.prompt : span.first] = True
    return Deafness(queries=queries & (inputs.tokens != model.audio_token_id), layers=deaf.layers)
