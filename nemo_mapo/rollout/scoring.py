"""The policy's own log-probs of an engine's tokens, under the distribution that the engine sampled from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.rollout.checks import never_drawn
from nemo_mapo.rollout.sampling import sampling_distribution


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawing:
    """How tokens are drawn from the model's distribution."""

    sampling: SamplingConfig
    never_drawn: tuple[int, ...]
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, sampling: SamplingConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> "Drawing":
        """The sampling of every backend: no special tokens except the end of turn, which stops a completion."""
        stops = {SpecialTokens.from_tokenizer(tokenizer).end_id}
        return cls(
            sampling=sampling,
            never_drawn=tuple(never_drawn(vocab_size, tokenizer, stops)),
            stop_ids=tuple(stops),
        )

    def log_probs(self, logits: Float[Tensor, "time vocab"], tokens: Int[Tensor, " time"]) -> Float[Tensor, " time"]:
        """log mu of each token of one completion, nats; -inf for one that could not be drawn.

        Args:
            logits: of the whole vocabulary, at the positions that predict the tokens.
            tokens: of the completion, from its first on.
        """
        steps = torch.arange(len(tokens), device=logits.device)
        # What comes later stands as a token that is never drawn.
        earlier = torch.where(steps < steps[:, None], tokens, self.never_drawn[0])
        distribution = sampling_distribution(
            logits,
            self.sampling,
            generated=earlier,
            forbidden_ids=torch.tensor(self.never_drawn, dtype=torch.int64, device=logits.device),
            stop_ids=torch.tensor(self.stop_ids, device=logits.device),
            steps=steps,
        )
        return distribution.gather(1, tokens[:, None]).squeeze(1)


def drawn_log_probs(
    model: AudioLLM,
    logits: Sequence[Float[Tensor, "_ shard"]],
    completions: Sequence[Int[Tensor, "_"]],
    drawing: Drawing,
) -> list[Float[Tensor, "_"]]:
    """`Drawing.log_probs` of completions, each with the logits that predict its tokens (`ModelInputs.by_row`)."""
    return [
        drawing.log_probs(model.whole_vocabulary(predicting), tokens)
        for predicting, tokens in zip(logits, completions, strict=True)
    ]
