"""Padded against packed training on completions of unequal length: computed tokens and seconds of a step, in pairs.

Lengths are drawn as those of sampled reasoning: log-normal, cut at the length limit, where some pile up. Both ways take
the same optimiser step (tests/distributed/test_layouts.py shows it); micro-batches hold about equally many tokens.
"""

import argparse
import statistics
import sys
import time

import torch

from nemo_mapo.config.model import DecoderConfig, ModelConfig
from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.models.layout import MicroBatching
from nemo_mapo.platform import hide_cuda_devices, initialize_parallel, install_cpu_host
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rows import Prompt, ScoredRow
from nemo_mapo.training.actor import MapoActor
from nemo_mapo.training.build import build_audio_llm
from nemo_mapo.training.optimizer import wrap_data_parallel
from nemo_mapo.training.references import FrozenReference

PROMPT, MEDIAN, SIGMA, LIMIT = 64, 150, 0.7, 440
"""Tokens of a prompt, median and spread (of the logarithm) of completions, and where they are cut."""
LEAST_GAIN = 1.5


def main() -> None:
    """Time both, and print one table; with --check fail where packing saves too little."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    hide_cuda_devices()
    install_cpu_host()
    initialize_parallel()
    actor, special = build_actor(MicroBatching(rows=arguments.micro_batch_size))
    batch = draw_batch(arguments.rows, special)
    lengths = torch.tensor(list(map(len, batch)))
    ways = {
        "padded": MicroBatching(rows=arguments.micro_batch_size),
        "packed": MicroBatching(rows=arguments.micro_batch_size, packed_tokens=arguments.packed_tokens),
    }
    tokens = {name: computed_tokens(lengths, batching, batch) for name, batching in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.pairs):
        for name, batching in ways.items():
            seconds[name].append(step(actor, batching, batch))
    mean = lengths.float().mean()
    print(f"{arguments.rows} rows, {int(lengths.min())} to {int(lengths.max())} tokens, mean {mean:.0f}")
    print(f"{'':<8}{'micro-batches':>14}{'tokens':>9}{'seconds':>9}")
    for name, batching in ways.items():
        parts = len(batching.split(batch))
        print(f"{name:<8}{parts:>14}{tokens[name]:>9}{statistics.median(seconds[name]):>9.2f}")
    faster = statistics.median(a / b for a, b in zip(seconds["padded"][1:], seconds["packed"][1:], strict=True))
    fewer = tokens["padded"] / tokens["packed"]
    pairs = arguments.pairs - 1
    print(f"padded / packed: {fewer:.2f} of the tokens, {faster:.2f} of the time (median of {pairs} pairs)")
    if arguments.check and fewer < LEAST_GAIN:
        sys.exit(f"packing computes only {fewer:.2f} times fewer tokens; {LEAST_GAIN} is asked for")


def build_actor(batching: MicroBatching) -> tuple[MapoActor, SpecialTokens]:
    """The embedded model with full MAPO."""
    tokenizer = build_tokenizer()
    special = SpecialTokens.from_tokenizer(tokenizer)
    config = ModelConfig(decoder=DecoderConfig(max_position_embeddings=1024), target_layers=(3, 4))

    def build():
        return build_audio_llm(config, vocab_size=len(tokenizer), special=special, sample_rate=16000, seed=0)

    policy = build()
    reference = FrozenReference(build(), special, keep_placeholders=False, batching=batching)
    backend = MegatronRollout(policy, tokenizer, batch_size=8)
    return MapoActor(wrap_data_parallel(policy), backend, reference, ObjectiveConfig(eta=0.1), batching), special


def draw_batch(rows: int, special: SpecialTokens) -> list[ScoredRow]:
    """Random words without audio: what is timed does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    drawn = MEDIAN * torch.exp(SIGMA * torch.randn(rows, generator=generator))
    completion_lengths = drawn.round().long().clamp(min=8, max=LIMIT)
    words = torch.randint(20, 200, (rows, PROMPT + int(completion_lengths.max())), generator=generator)
    words[words == special.audio_id] = 21
    advantages = torch.randn(rows, generator=generator)
    return [
        ScoredRow(
            prompt=Prompt(id=str(number), token_ids=words[number, :PROMPT]),
            token_ids=words[number, PROMPT : PROMPT + length],
            old_log_probs=torch.full((length,), -6.0),
            ref_log_probs=torch.full((length,), -6.0),
            text_ref_entropy_nats=torch.full((length,), 5.0),
            pos_gate=torch.ones(length, dtype=torch.bool),
            advantages=advantages[number],
            accuracy_rewards=torch.tensor(0.0),
            finished=torch.tensor(True),
        )
        for number, length in enumerate(completion_lengths.tolist())
    ]


def computed_tokens(lengths: torch.Tensor, batching: MicroBatching, batch: list[ScoredRow]) -> int:
    """Positions that go through the model: rows times the longest of a micro-batch, or the tokens themselves."""
    if batching.packed_tokens is not None:
        return int(lengths.sum())
    return sum(len(lengths[rows]) * int(lengths[rows].max()) for rows in batching.split(batch))


def step(actor: MapoActor, batching: MicroBatching, batch: list[ScoredRow]) -> float:
    """Seconds of forward and backward over the batch."""
    actor.batching = batching
    actor.wrapped.zero_grad_buffer()
    started = time.perf_counter()
    actor.get_loss_and_metrics(batch, forward_only=False)
    return time.perf_counter() - started


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="completions of the step (default: %(default)s)")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="padded rows (default: %(default)s)")
    parser.add_argument("--packed-tokens", type=int, default=2048, help="of a packed row (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=6, help="the first is not counted (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="fail below the gain that is asked for")
    return parser.parse_args()


if __name__ == "__main__":
    main()
