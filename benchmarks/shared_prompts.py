"""Step time with a prompt read once for its group and once per completion: `python benchmarks/shared_prompts.py`.

Everything but generation is timed: old-policy, reference and text-reference passes, loss and gradient of full MAPO,
with the embedded model on clips of noise and random completions. Both ways are timed in alternation on the same batch;
the ratio is the median over pairs.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass

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

SAMPLE_RATE = 16000
QUESTION = 30
"""Tokens of a prompt that are not audio."""
FIRST_WORD = 20
"""Ids below are special tokens and punctuation."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Tokens of a prompt and of each completion, completions per prompt, and prompts in the batch."""

    prompt: int
    completion: int
    group: int
    prompts: int
    most: float
    """Step time relative to a row each that `--check` accepts."""


SHAPES = (
    Shape(prompt=55, completion=63, group=8, prompts=8, most=0.75),
    Shape(prompt=400, completion=200, group=8, prompts=2, most=0.55),
    Shape(prompt=775, completion=480, group=8, prompts=1, most=0.6),
)


def main() -> None:
    """Time each shape and print one table."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    hide_cuda_devices()
    install_cpu_host()
    initialize_parallel()
    actor, special = build_actor()
    print(f"{'(P, T, G)':<16}{'tokens':>8}{'shared':>8}{'s/step':>9}{'shared':>8}{'ratio':>7}  range")
    slow = []
    for shape in SHAPES:
        ratio = compare(actor, shape, special, pairs=arguments.pairs)
        slow += [shape] if ratio > shape.most else []
    if arguments.check and slow:
        sys.exit(f"slower than asked for: {slow}")


def build_actor() -> tuple[MapoActor, SpecialTokens]:
    """The embedded model with full MAPO."""
    tokenizer = build_tokenizer()
    special = SpecialTokens.from_tokenizer(tokenizer)
    config = ModelConfig(decoder=DecoderConfig(max_position_embeddings=2048), target_layers=(3, 4))

    def build():
        return build_audio_llm(config, vocab_size=len(tokenizer), special=special, sample_rate=SAMPLE_RATE, seed=0)

    policy, batching = build(), MicroBatching(rows=8)
    reference = FrozenReference(build(), special, keep_placeholders=False, batching=batching)
    backend = MegatronRollout(policy, tokenizer, batch_size=8)
    return MapoActor(wrap_data_parallel(policy), backend, reference, ObjectiveConfig(eta=0.1), batching), special


def compare(actor: MapoActor, shape: Shape, special: SpecialTokens, *, pairs: int) -> float:
    """Print a row of the table; the median ratio of step times."""
    batch = draw_batch(actor, shape, special)
    rows = MicroBatching(rows=8)
    shared = MicroBatching(rows=8, shared_prompts=True)
    seconds = [(step(actor, shared, batch), step(actor, rows, batch)) for _ in range(pairs + 1)][1:]
    ratios = sorted(ours / theirs for ours, theirs in seconds)
    ratio = statistics.median(ratios)
    separate = sum(map(len, batch))
    read = shared.lay_out(batch, actor.policy).tokens.shape[1]
    ours, theirs = (statistics.median(column) for column in zip(*seconds, strict=True))
    name = f"({shape.prompt}, {shape.completion}, {shape.group})"
    print(
        f"{name:<16}{separate:>8}{read:>8}{theirs:>9.2f}{ours:>8.2f}{ratio:>7.2f}  {ratios[0]:.2f} to {ratios[-1]:.2f}"
    )
    return ratio


def step(actor: MapoActor, batching: MicroBatching, batch: list[ScoredRow]) -> float:
    """Seconds of the passes without gradient and of one optimiser step's gradient."""
    actor.batching = actor.reference.batching = batching
    actor.wrapped.zero_grad_buffer()
    started = time.perf_counter()
    actor.get_inference_signals(batch)
    actor.get_init_policy_logprobs(batch)
    actor.reference.text_entropy(batch)
    actor.get_loss_and_metrics(batch, forward_only=False)
    return time.perf_counter() - started


def draw_batch(actor: MapoActor, shape: Shape, special: SpecialTokens) -> list[ScoredRow]:
    """Random words over noise: what is timed does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    rows = shape.prompts * shape.group
    samples = clip_samples(actor, shape.prompt - QUESTION)
    words = torch.randint(FIRST_WORD, 200, (rows, shape.prompt + shape.completion), generator=generator)
    marks = (special.audio_id, special.audio_start_id, special.audio_end_id)
    words[torch.isin(words, torch.tensor(marks))] = FIRST_WORD
    words[:, 1 : shape.prompt - QUESTION + 1] = special.audio_id
    clips = torch.randn(shape.prompts, samples, generator=generator) * 0.1
    prompts = [
        Prompt(id=str(number), token_ids=words[number * shape.group, : shape.prompt], clips=(clip,))
        for number, clip in enumerate(clips)
    ]
    advantages = torch.randn(rows, generator=generator)
    return [
        ScoredRow(
            prompt=prompts[number // shape.group],
            token_ids=words[number, shape.prompt :],
            old_log_probs=torch.full((shape.completion,), -6.0),
            ref_log_probs=torch.full((shape.completion,), -6.0),
            text_ref_entropy_nats=torch.full((shape.completion,), 5.0),
            pos_gate=torch.ones(shape.completion, dtype=torch.bool),
            advantages=advantages[number],
            accuracy_rewards=torch.tensor(0.0),
            finished=torch.tensor(True),
        )
        for number in range(rows)
    ]


def clip_samples(actor: MapoActor, tokens: int) -> int:
    """Length of a clip that takes this many placeholders."""
    samples = SAMPLE_RATE // 100
    while actor.policy.num_audio_tokens(samples) < tokens:
        samples += SAMPLE_RATE // 100
    return samples


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="fail if a ratio is above what is asked for")
    return parser.parse_args()


if __name__ == "__main__":
    main()
