"""The end-to-end check of an update: a fixed prompt, completed by vLLM and scored by the policy."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import PADDED_ROWS, known_to_all_stages
from nemo_mapo.models.pipeline import evaluation_mode, forward_all_stages, whole_sequences
from nemo_mapo.rollout.completions import Drawn
from nemo_mapo.rollout.scoring import Drawing, drawn_log_probs
from nemo_mapo.rollout.vllm.requests import Wanted
from nemo_mapo.rows import Prompt, Row

CLIP_SECONDS: Final = 0.5
_TEXT_TOKENS: Final = 8
COMPLETION_TOKENS: Final = 16
SEED: Final = 20260527


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """A prompt about half a second of noise, and its sampling."""

    prompt: Prompt
    drawing: Drawing

    @classmethod
    def of(cls, policy: AudioLLM, drawing: Drawing, special: SpecialTokens, *, sample_rate: int) -> "Probe":
        """Always the same for one model; its words are spread over the vocabulary."""
        samples = round(CLIP_SECONDS * sample_rate)
        noise = torch.randn(samples, generator=torch.Generator().manual_seed(SEED)) * 0.1
        words = sorted(set(range(policy.vocab_size)) - set(drawing.never_drawn) - set(drawing.stop_ids))
        text = words[:: max(1, len(words) // _TEXT_TOKENS)][:_TEXT_TOKENS]
        clip = [special.audio_start_id, *[special.audio_id] * policy.num_audio_tokens(samples), special.audio_end_id]
        tokens = torch.tensor([*clip, *text])
        tokens_left = min(COMPLETION_TOKENS, policy.max_positions - len(tokens))
        sampling = SamplingConfig(temperature=1.0, min_new_tokens=tokens_left, max_new_tokens=tokens_left)
        return cls(
            prompt=Prompt(id="probe", token_ids=tokens, clips=(noise,)),
            drawing=replace(drawing, sampling=sampling),
        )

    @property
    def wanted(self) -> Wanted:
        """One completion, always with the same seed."""
        return Wanted(drawing=self.drawing, first_seed=SEED, count=1)

    @torch.no_grad()
    def scored(self, policy: AudioLLM, completions: Sequence[Drawn]) -> list[Drawn]:
        """The completions with the log-probs that the policy gives their tokens; to be called by all ranks."""
        rows = [Row(prompt=self.prompt, token_ids=torch.tensor(one.token_ids)) for one in completions]
        inputs = PADDED_ROWS.lay_out(rows, policy)
        tokens = [row.token_ids.to(policy.device) for row in rows]
        with evaluation_mode(policy), whole_sequences(policy):
            output = inputs.call(partial(forward_all_stages, policy), None)
            found = None
            if output is not None:
                found = drawn_log_probs(policy, inputs.by_row(output.logits), tokens, self.drawing)
        ours = known_to_all_stages(found, rows, policy)
        return [
            replace(one, sampling_log_probs=tuple(values.tolist()))
            for values, one in zip(ours, completions, strict=True)
        ]


def difference(expected: Float[Tensor, "_"], completion: Drawn) -> float:
    """Mean difference between a completion's log-probs and the expected ones, nats."""
    return float((expected - torch.tensor(completion.sampling_log_probs)).abs().mean())
