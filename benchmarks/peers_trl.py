"""TRL's side of `benchmarks/peers.py`: GRPOTrainer, one step per line on standard input. Runs in .venv-peers."""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peers_protocol import Clock, answer, peak_mib, ready, reset_peak
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class OneStepPerLine(TrainerCallback):
    """Waits for a line before each step, and answers it with the step's seconds and peak memory."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Wait; then the clock runs."""
        if state.global_step == 0:
            ready()
        if not sys.stdin.readline():
            sys.exit()
        reset_peak()
        self.clock = Clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Answer."""
        answer(self.clock.seconds() | {"peak_mib": peak_mib()})


def main() -> None:
    """Train until the lines end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=Path, help="JSON file that benchmarks/peers.py writes")
    settings = json.loads(parser.parse_args().settings.read_text())
    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    prompts = settings["prompts"]
    for prompt in prompts:
        assert len(tokenizer(prompt)["input_ids"]) == settings["prompt_tokens"], prompt
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32),
            args=arguments(settings, folder),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            reward_funcs=reward,
            callbacks=[OneStepPerLine()],
        )
        trainer.train()


def arguments(settings: dict[str, Any], folder: str) -> GRPOConfig:
    """GRPO with a reference model, one optimiser step per batch, completions of one length."""
    rows = len(settings["prompts"]) * settings["group"]
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=settings["rows"],
        gradient_accumulation_steps=rows // settings["rows"],
        num_generations=settings["group"],
        max_completion_length=settings["completion_tokens"],
        generation_kwargs={"min_new_tokens": settings["completion_tokens"]},
        temperature=settings["temperature"],
        top_k=settings["top_k"],
        top_p=settings["top_p"],
        beta=settings["beta"],
        learning_rate=settings["learning_rate"],
        max_grad_norm=1.0,
        max_steps=10**6,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def reward(completions: list[str], **others: Any) -> list[float]:
    """Some number that differs within a group."""
    return [float(len(text) % 7) for text in completions]


if __name__ == "__main__":
    main()
