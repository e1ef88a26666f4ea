"""Seconds per step of GRPO and MAPO on the same tokens, split by phase: `python benchmarks/step.py`.

GRPO here needs neither text-only reference, POS gate nor audio mass. Both are timed on one rollout batch of random
completions, in alternation; the ratio is the median over pairs. Generation is the same for both and timed once.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.config.rewards import RewardsConfig
from nemo_mapo.config.run import RolloutConfig, SamplingConfig
from nemo_mapo.data.prompts import encode_prompt
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.embedded.synthetic import SyntheticCorpusConfig, plan_split
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.models.layout import MicroBatching
from nemo_mapo.platform import hide_cuda_devices, initialize_parallel, install_cpu_host
from nemo_mapo.pos_gate.tagger import build_tagger
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rows import Problem, Prompt
from nemo_mapo.training.actor import MapoActor
from nemo_mapo.training.build import build_audio_llm
from nemo_mapo.training.optimizer import wrap_data_parallel
from nemo_mapo.training.references import FrozenReference
from nemo_mapo.training.scoring import RolloutScorer
from nemo_mapo.types import Wording

SAMPLE_RATE = 16000
CLIP_SAMPLES = 2 * SAMPLE_RATE
OBJECTIVES = {
    "grpo": ObjectiveConfig(mask="none", eta=0.0, log_grounding=False),
    "mapo": ObjectiveConfig(),
}


class PhaseTimer:
    """Collects seconds by phase in the shape that the scorer calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time one phase."""
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def main() -> None:
    """Time, and print one table."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    hide_cuda_devices()
    install_cpu_host()
    initialize_parallel()
    step_of, rollout_seconds = prepare(arguments)
    for step in step_of.values():
        step()
    pairs = [{name: step() for name, step in step_of.items()} for _ in range(arguments.pairs)]
    report(pairs, rollout_seconds)


def prepare(arguments: argparse.Namespace) -> tuple[dict[str, Callable[[], dict[str, float]]], float]:
    """Build the embedded model and one rollout batch; return a timed step of each objective."""
    tokenizer = build_tokenizer()
    special = SpecialTokens.from_tokenizer(tokenizer)
    config = ModelConfig(target_layers=(3, 4))

    def build():
        return build_audio_llm(config, vocab_size=len(tokenizer), special=special, sample_rate=SAMPLE_RATE, seed=0)

    policy, frozen = build(), build()
    backend = MegatronRollout(policy, tokenizer, batch_size=64)
    problems = draw_problems(arguments.prompts, policy.num_audio_tokens(CLIP_SAMPLES), tokenizer)
    sampling = SamplingConfig(min_new_tokens=arguments.tokens, max_new_tokens=arguments.tokens)
    started = time.perf_counter()
    seeds = torch.arange(arguments.prompts * arguments.group_size)
    prompts = [problem.prompt for problem in problems]
    drawn = backend.generate(prompts, sampling, group_size=arguments.group_size, seeds=seeds)
    groups = [problem.answered(completions) for problem, completions in zip(problems, drawn, strict=True)]
    rollout_seconds = time.perf_counter() - started
    tagger = build_tagger(download=False)
    batching = MicroBatching(rows=config.micro_batch_size)
    wrapped = wrap_data_parallel(policy)

    def step(objective: ObjectiveConfig) -> dict[str, float]:
        reference = FrozenReference(frozen, special, keep_placeholders=False, batching=batching)
        actor = MapoActor(wrapped, backend, reference, objective, batching)
        scorer = RolloutScorer(
            tokenizer, special, tagger, RewardsConfig(), objective, RolloutConfig(), optimizer_steps=1
        )
        timer = PhaseTimer()
        scored = scorer(groups, actor, timer)
        with timer("train"):
            ((_, batch),) = scored.in_steps(1)
            actor.training_pass(batch)
        wrapped.zero_grad_buffer()
        return timer.seconds

    return {
        name: (lambda objective=objective: step(objective)) for name, objective in OBJECTIVES.items()
    }, rollout_seconds


def draw_problems(count, audio_tokens, tokenizer) -> list[Problem]:
    """Questions of the embedded corpus over noise."""
    noise = torch.randn(count, CLIP_SAMPLES) * 0.1
    drawn = plan_split(SyntheticCorpusConfig(train=count, validation=0, test=0), "train")
    return [
        problem_about(clip.example, waveform, audio_tokens, tokenizer)
        for clip, waveform in zip(drawn, noise, strict=True)
    ]


def problem_about(example, waveform, audio_tokens, tokenizer) -> Problem:
    """A question about a clip."""
    token_ids = torch.tensor(encode_prompt(example, audio_tokens, tokenizer, Wording()))
    return Problem(prompt=Prompt(id=example.id, token_ids=token_ids, clips=(waveform,)), example=example)


def report(pairs: list[dict[str, dict[str, float]]], rollout_seconds: float) -> None:
    """Median seconds by phase and the paired ratio of the whole step."""
    print(f"{'phase':<12}{'GRPO s':>9}{'MAPO s':>9}")
    print(f"{'rollout':<12}{rollout_seconds:>9.2f}{rollout_seconds:>9.2f}")
    for phase in pairs[0]["mapo"]:
        medians = [statistics.median(pair[name][phase] for pair in pairs) for name in OBJECTIVES]
        print(f"{phase:<12}{medians[0]:>9.2f}{medians[1]:>9.2f}")
    totals = [{name: rollout_seconds + sum(pair[name].values()) for name in OBJECTIVES} for pair in pairs]
    print(f"{'step':<12}" + "".join(f"{statistics.median(t[name] for t in totals):>9.2f}" for name in OBJECTIVES))
    ratio = statistics.median(total["mapo"] / total["grpo"] for total in totals)
    print(f"MAPO / GRPO, median of {len(pairs)} pairs: {ratio:.2f}")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=63, help="length of every completion (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
