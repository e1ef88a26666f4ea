"""From logits to a token: the distribution sampled from, the draw, and the log-probability of the drawn token.

All functions are pure. Randomness enters as uniforms that depend on a row's seed only, so a row's sample does not
depend on its neighbours in the batch.
"""

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from nemo_mapo.config.run import SamplingConfig

_IMPOSSIBLE = float("-inf")
_UINT64_MASK = 2**64 - 1
"""Maps a signed 64-bit seed onto the unsigned key that Philox takes."""


def sampling_distribution(
    logits: Float[Tensor, "batch vocab"],
    sampling: SamplingConfig,
    *,
    generated: Int[Tensor, "batch past"],
    forbidden_ids: Int[Tensor, " forbidden"],
    stop_ids: Int[Tensor, " stops"],
    steps: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch vocab"]:
    """Log-probabilities (nats, float32) of the distribution that the next token is drawn from; -inf is never drawn.

    In this order: forbidden tokens are excluded; tokens of `generated` are penalised; stop tokens are excluded while
    fewer than `min_new_tokens` tokens were generated; logits are divided by the temperature; the `top_k` most likely
    tokens are kept; of those, renormalised, the smallest set is kept whose probability reaches `top_p`. Equal logits
    rank by token id. Temperature 0 puts all probability on the most likely token.

    Args:
        logits: of the next token.
        sampling: the parameters.
        generated: completion tokens so far (not the prompt).
        forbidden_ids: tokens that are never drawn.
        stop_ids: tokens that end a completion. They and the forbidden ones must leave something to draw.
        steps: how many of `generated` each row has; None is all of them.
    """
    if steps is None:
        steps = torch.full((len(logits),), generated.shape[1], device=logits.device)
    scores = logits.float().index_fill(1, forbidden_ids, _IMPOSSIBLE)
    if sampling.repetition_penalty != 1.0:
        scores = penalize_repetition(scores, generated, sampling.repetition_penalty, steps)
    if sampling.min_new_tokens > 0:
        unstopped = scores.index_fill(1, stop_ids, _IMPOSSIBLE)
        scores = torch.where((steps < sampling.min_new_tokens)[:, None], unstopped, scores)
    if sampling.temperature == 0:
        return _greedy(scores)
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.shape[1] or sampling.top_p < 1.0:
        scores = keep_most_likely(scores, top_k=sampling.top_k, top_p=sampling.top_p)
    return torch.log_softmax(scores, dim=-1)


def penalize_repetition(
    scores: Float[Tensor, "batch vocab"],
    generated: Int[Tensor, "batch past"],
    penalty: float,
    steps: Int[Tensor, " batch"],
) -> Float[Tensor, "batch vocab"]:
    """Divide positive and multiply negative scores of each row's first `steps` tokens by `penalty`, once each.

    Entries after `steps` must not be tokens that the row contains (padding is fine).
    """
    repeated = scores.gather(1, generated)
    penalized = torch.where(repeated > 0, repeated / penalty, repeated * penalty)
    written = torch.arange(generated.shape[1], device=scores.device) < steps[:, None]
    penalized = torch.where(written, penalized, repeated)
    return scores.scatter(1, generated, penalized)


def keep_most_likely(scores: Float[Tensor, "batch vocab"], *, top_k: int, top_p: float) -> Float[Tensor, "batch vocab"]:
    """Set scores to -inf outside the `top_k` best tokens (0 is off), then outside the smallest set reaching `top_p`.

    The probability in the second filter is that of the tokens which the first one kept.
    """
    vocabulary = scores.shape[1]
    best = scores.topk(top_k if 0 < top_k < vocabulary else vocabulary).values
    kept = torch.full_like(best[:, :1], best.shape[1], dtype=torch.int64)
    if top_p < 1.0:
        probabilities = torch.softmax(best, dim=-1)
        kept = (probabilities.cumsum(-1) - probabilities < top_p).sum(-1, keepdim=True)
    # The number of kept tokens and their lowest score determine which: the vocabulary need not be sorted.
    least = best.gather(1, kept - 1)
    above, equal = scores > least, scores == least
    first_equal = equal & (equal.cumsum(-1) <= kept - above.sum(-1, keepdim=True))
    return scores.masked_fill(~(above | first_equal), _IMPOSSIBLE)


def _greedy(scores: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
    certain = torch.full_like(scores, _IMPOSSIBLE)
    return certain.scatter_(1, scores.argmax(dim=-1, keepdim=True), 0.0)


def row_uniforms(seeds: Int[Tensor, " batch"], steps: int) -> Float64[Tensor, "batch steps"]:
    """Uniforms in [0, 1), one stream per seed (counter-based Philox); more steps extend a stream, never change it."""
    streams = [np.random.Generator(np.random.Philox(key=seed & _UINT64_MASK)) for seed in seeds.tolist()]
    uniforms = np.empty((len(streams), steps))
    for row, stream in enumerate(streams):
        stream.random(out=uniforms[row])
    return torch.from_numpy(uniforms).to(seeds.device)


def sample(log_probs: Float[Tensor, "batch vocab"], uniforms: Float64[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Draw one token per row by inverting the cumulative distribution in token order, in float64.

    The token is the first whose cumulative probability exceeds u times the total. A token of probability zero is
    never drawn, whatever the rounding; u = 1 gives the last possible token.
    """
    probabilities = log_probs.double().exp()
    cumulative = probabilities.cumsum(-1).masked_fill(probabilities == 0, -1.0)
    total = cumulative.amax(-1, keepdim=True)
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return (cumulative > target).to(torch.uint8).argmax(-1)


def token_log_probs(logits: Float[Tensor, "batch vocab"], tokens: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """log pi(token), nats: log-softmax of the raw logits over the full vocabulary at temperature 1."""
    raw = logits.float()
    return raw.gather(1, tokens[:, None]).squeeze(1) - raw.logsumexp(-1)
