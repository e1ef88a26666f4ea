"""Our side of `benchmarks/peers.py`: generation, passes and optimiser step, one step per line on standard input."""

import argparse
import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peers_protocol import Clock, answer, peak_mib, ready, reset_peak
from rollout import build_pair, model_config_of
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.model import OptimizerConfig
from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.config.rewards import RewardsConfig
from nemo_mapo.config.run import RolloutConfig, SamplingConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import MicroBatching
from nemo_mapo.platform import hide_cuda_devices, initialize_parallel, install_cpu_host
from nemo_mapo.pos_gate.tagger import build_tagger
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rows import Problem, Prompt
from nemo_mapo.training.actor import MapoActor
from nemo_mapo.training.build import build_audio_llm
from nemo_mapo.training.optimizer import build_optimizer, wrap_data_parallel
from nemo_mapo.training.references import FrozenReference
from nemo_mapo.training.scoring import RolloutScorer
from nemo_mapo.types import Example

SAMPLE_RATE = 16000
QUESTION = 20
"""Tokens of an audio prompt that are not audio."""


def main() -> None:
    """Write TRL's model directory, or train until the lines end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=Path, help="JSON file that benchmarks/peers.py writes")
    parser.add_argument("--export", action="store_true", help="write the decoder for TRL and stop")
    arguments = parser.parse_args()
    settings = json.loads(arguments.settings.read_text())
    torch.set_num_threads(settings["threads"])
    hide_cuda_devices()
    install_cpu_host()
    initialize_parallel()
    tokenizer = build_tokenizer()
    if arguments.export:
        _, theirs = build_pair(
            tokenizer, layers=settings["layers"], width=settings["width"], positions=settings["positions"]
        )
        theirs.save_pretrained(settings["model"])
        tokenizer.save_pretrained(settings["model"])
        return
    step = Step(settings, tokenizer)
    ready()
    while sys.stdin.readline():
        reset_peak()
        clock = Clock()
        step()
        answer(clock.seconds() | {"peak_mib": peak_mib()})


class Step:
    """A training step of GRPO or MAPO as the trainer takes it, on the same prompts each time."""

    def __init__(self, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
        self.group = settings["group"]
        self.count = 0
        special = SpecialTokens.from_tokenizer(tokenizer)
        config = model_config_of(settings["layers"], settings["width"], positions=settings["positions"])

        def build() -> AudioLLM:
            size = len(tokenizer)
            return build_audio_llm(config, vocab_size=size, special=special, sample_rate=SAMPLE_RATE, seed=0)

        policy = build()
        batching = MicroBatching(rows=settings["rows"], shared_prompts=True)
        reference = FrozenReference(build(), special, keep_placeholders=False, batching=batching)
        self.sampling = SamplingConfig(
            temperature=settings["temperature"],
            top_k=settings["top_k"],
            top_p=settings["top_p"],
            min_new_tokens=settings["completion_tokens"],
            max_new_tokens=settings["completion_tokens"],
        )
        objective = ObjectiveConfig(mask="none", eta=0.0, log_grounding=False, beta=settings["beta"])
        if settings["method"] == "mapo":
            objective = ObjectiveConfig(beta=settings["beta"])
        wrapped = wrap_data_parallel(policy)
        slots = len(settings["prompts"]) * self.group
        self.actor = MapoActor(
            wrapped, MegatronRollout(policy, tokenizer, batch_size=slots), reference, objective, batching
        )
        self.scorer = RolloutScorer(
            tokenizer,
            special,
            build_tagger(download=False),
            RewardsConfig(),
            objective,
            RolloutConfig(),
            optimizer_steps=1,
        )
        self.optimizer = build_optimizer(wrapped, OptimizerConfig(lr=settings["learning_rate"]))
        self.learning_rate = settings["learning_rate"]
        self.problems = problems_of(settings, policy, tokenizer, special)

    def __call__(self) -> None:
        """Generate, score, and take one optimiser step."""
        rows = len(self.problems) * self.group
        seeds = torch.arange(rows) + rows * self.count
        self.count += 1
        self.actor.prepare_for_inference()
        with torch.no_grad():
            prompts = [problem.prompt for problem in self.problems]
            drawn = self.actor.infer(prompts, self.sampling, group_size=self.group, seeds=seeds)
        groups = [problem.answered(completions) for problem, completions in zip(self.problems, drawn, strict=True)]
        scored = self.scorer(groups, self.actor, untimed)
        self.actor.finish_inference()
        # Rewards of a random policy are all equal: their gradient would be 0, which costs no less, but looks so.
        drawn_rows = [
            replace(row, advantages=advantage) for row, advantage in zip(scored.rows, torch.randn(rows), strict=True)
        ]
        self.optimizer.zero_grad()
        self.actor.training_pass(drawn_rows)
        self.optimizer.step(lr=self.learning_rate, max_norm=1.0)


def untimed(name: str) -> contextlib.AbstractContextManager[None]:
    """Phases are not told apart."""
    return contextlib.nullcontext()


def problems_of(
    settings: dict[str, Any], policy: AudioLLM, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens
) -> list[Problem]:
    """TRL's prompts; with `audio` most of each is a clip of noise."""
    tokens = torch.tensor([tokenizer(prompt)["input_ids"] for prompt in settings["prompts"]])
    count, length = tokens.shape
    clips: list[tuple[Tensor, ...]] = [()] * count
    if settings["audio"]:
        samples = SAMPLE_RATE // 10
        while policy.num_audio_tokens(samples) < length - QUESTION:
            samples += SAMPLE_RATE // 100
        tokens[:, 1 : 1 + length - QUESTION] = special.audio_id
        clips = [(clip,) for clip in torch.randn(count, samples) * 0.1]
    return [
        Problem(
            prompt=Prompt(id=str(row), token_ids=ids, clips=heard),
            example=Example(id=str(row), question="?", choices=("a", "b"), answer="a", task=""),
        )
        for row, (ids, heard) in enumerate(zip(tokens, clips, strict=True))
    ]


if __name__ == "__main__":
    main()
