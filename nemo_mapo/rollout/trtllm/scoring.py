"""Log-probs of TensorRT-LLM's tokens, from those that it reports and the policy's own logits.

TensorRT-LLM reports each token's log-prob under the distribution after temperature and bad words, over the whole
vocabulary. We need two others: the model's own, and that of the distribution sampled from. The correction between them
depends only on the logits, so it is computed from the policy's logits. If engine and policy agree, the results are
exact; otherwise the difference is the engine's alone and shows in `rollout/log_prob_mismatch`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemo_mapo.config.run import SamplingConfig

_IMPOSSIBLE = float("-inf")


class TokenLogProbs(NamedTuple):
    """Of drawn tokens, nats."""

    model: Float[Tensor, " token"]
    """log pi, temperature 1, whole vocabulary."""
    sampling: Float[Tensor, " token"]
    """log mu, of the distribution that the engine drew from."""


def completed_log_probs(
    reported: Float[Tensor, " token"],
    logits: Float[Tensor, "token vocab"],
    tokens: Int[Tensor, " token"],
    sampling: SamplingConfig,
    *,
    forbidden_ids: Int[Tensor, " forbidden"],
) -> TokenLogProbs:
    """Both log-probs of each drawn token.

    Args:
        reported: by the engine.
        logits: of the policy, unmodified, at the positions that predict the tokens.
        tokens: that were drawn.
        sampling: how; repetition penalty and minimum length are off.
        forbidden_ids: bad words.
    """
    logits = logits.float()
    temperature = sampling.temperature or 1.0
    scaled = torch.log_softmax(logits.index_fill(1, forbidden_ids, _IMPOSSIBLE) / temperature, dim=-1)
    of_token = scaled.gather(1, tokens[:, None]).squeeze(1)
    plain = logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)
    if sampling.temperature == 0:
        drawn_from = torch.zeros_like(reported)
    else:
        drawn_from = reported + restriction(scaled, tokens, top_k=sampling.top_k, top_p=sampling.top_p)
    return TokenLogProbs(model=reported + plain - of_token, sampling=drawn_from)


def restriction(
    log_probs: Float[Tensor, "token vocab"], tokens: Int[Tensor, " token"], *, top_k: int, top_p: float
) -> Float[Tensor, " token"]:
    """What top-k and top-p add to the log-prob of each token, in nats, as TensorRT-LLM samples.

    It ranks tokens by probability, draws a number between 0 and theta = top_p * (mass of the top_k), and takes the
    first token whose cumulative probability reaches it. So a token has P / theta, except the last that can be drawn,
    which has the remainder below theta. A token beyond that one, drawn because the engine's numbers differ slightly,
    is treated like any other.

    Args:
        log_probs: normalised, over the whole vocabulary.
        tokens: whose share is asked for.
        top_k: 0 is off.
        top_p: 1 is off.
    """
    ranked, order = torch.sort(log_probs, dim=-1, descending=True, stable=True)
    cumulative = ranked.double().exp().cumsum(-1)
    mass = cumulative[:, min(top_k, cumulative.shape[1]) - 1] if top_k > 0 else torch.ones_like(cumulative[:, 0])
    theta = top_p * mass
    if top_p == 1:
        return -theta.log().to(log_probs.dtype)
    rank = (order == tokens[:, None]).to(torch.uint8).argmax(-1, keepdim=True)
    probability = log_probs.gather(1, tokens[:, None]).squeeze(1).double().exp()
    left = theta - (cumulative.gather(1, rank).squeeze(1) - probability)
    is_last = (left > 0) & (left < probability)
    share = torch.where(is_last, left, probability) / theta
    return (share / probability).log().to(log_probs.dtype)
