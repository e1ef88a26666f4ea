"""A run directory with files as a trainer writes them, made up: noisy curves that learn, listen and cost time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

Record = dict[str, Any]
STEPS = 40
VALIDATE_EVERY = 10
ATTRIBUTES = ("rising", "falling", "peaking", "dipping")
BINS = 20


class FakeRun:
    """A run to be: change the parts that a test is about, then write."""

    def __init__(self, *, seed: int = 0, steps: int = STEPS, eta: float = 0.01, gain: float = 0.21) -> None:
        self.random = np.random.default_rng(seed)
        self.steps = steps
        self.eta = eta
        self.gain = gain
        self.mass_gain = 0.2 if eta else -0.01
        self.metrics = [self._start()] + [self._step(step) for step in range(1, steps + 1)]
        self.profiles = [self._profile(0, "before", 0.0), self._profile(steps, "after", self.mass_gain)]
        self.rollouts = self._rollouts()
        self.run: Record | None = {
            "title": "Embedded run, full MAPO",
            "started": "2026-02-03 09:12",
            "finished": "2026-02-03 09:19",
            "seconds_total": 430.0 + 4 * seed,
            "peak_rss_gb": 2.41,
            "pos_tagger": "averaged perceptron",
            "test": {
                "accuracy": 0.43 + gain,
                "accuracy_silent": 0.262 + self._noise(0.01),
                "audio_mass_late": 0.43 + self.mass_gain + self._noise(0.015),
                "completion_tokens": 55.2 + self._noise(0.8),
                "start_accuracy": 0.43,
                "start_accuracy_silent": 0.258,
                "start_audio_mass_late": 0.43,
                "start_completion_tokens": 58.1,
                "samples": 1000.0,
            },
            "events": [{"step": 20, "message": "resumed from checkpoints/step=20"}],
        }
        self.test = self._test()
        self.objective: Record = {"mask": "relevance", "eta": eta, "beta": 0.02, "tau_base": 0.1, "mask_clip": 5.0}

    def write(self, run_dir: Path) -> Path:
        """Write all files of the run into `run_dir`."""
        run_dir.mkdir(parents=True, exist_ok=True)
        write_jsonl(run_dir / "metrics.jsonl", self.metrics)
        write_jsonl(run_dir / "profiles.jsonl", self.profiles)
        write_jsonl(run_dir / "rollouts.jsonl", self.rollouts)
        write_jsonl(run_dir / "test.jsonl", self.test)
        (run_dir / "config.yaml").write_text(yaml.safe_dump({"objective": self.objective}))
        if self.run is not None:
            (run_dir / "run.json").write_text(json.dumps(self.run))
        return run_dir

    def change(self, key: str, values: Callable[[float], float]) -> None:
        """Set metric `key` at every training step to `values(progress)`, progress running from 0 to 1."""
        for record in self.metrics[1:]:
            record[key] = values(record["step"] / self.steps)

    def drop(self, prefix: str) -> None:
        """Take out every metric whose name starts with `prefix`."""
        self.metrics = [
            {key: value for key, value in record.items() if not key.startswith(prefix)} for record in self.metrics
        ]

    def _noise(self, size: float) -> float:
        return float(self.random.normal(0, size))

    def _start(self) -> Record:
        return {"step": 0, **self._validation(0.0), "timing/validation_seconds": 3.2}

    def _validation(self, progress: float) -> Record:
        return {
            "val/questions": 150.0,
            "val/accuracy": 0.43 + self.gain * progress + self._noise(0.015),
            "val/accuracy_silent": 0.265 + self._noise(0.012),
            "val/reward": 2.6 + 0.8 * progress,
            "val/completion_tokens": 58 - 3 * progress,
            "val/reasoning_words": 47 - 2 * progress,
            "val/audio_mass": 0.55 + 0.7 * self.mass_gain * progress,
            "val/audio_mass_early": 0.66 + 0.4 * self.mass_gain * progress,
            "val/audio_mass_late": 0.43 + self.mass_gain * progress,
        }

    def _step(self, step: int) -> Record:
        progress = step / self.steps
        return {
            "step": step,
            **self._rollout(progress),
            **self._losses(progress),
            **self._mapo(progress),
            **(self._validation(progress) if step % VALIDATE_EVERY == 0 or step == self.steps else {}),
            **self._timing(step),
        }

    def _rollout(self, progress: float) -> Record:
        accuracy = float(np.clip(0.38 + self.gain * progress + self._noise(0.06), 0, 1))
        form, consistency = 0.96 + self._noise(0.01), 0.7 + 0.15 * progress + self._noise(0.03)
        return {
            "rollout/reward_mean": 2 * accuracy + form + consistency,
            "rollout/accuracy": accuracy,
            "rollout/format": form,
            "rollout/consistency": consistency,
            "rollout/completion_tokens": 58 - 3 * progress + self._noise(1.2),
            "rollout/reasoning_words": 47 - 2 * progress + self._noise(1.0),
            "rollout/finished_share": 0.99,
            "rollout/tokens_per_second": 3100 + self._noise(120),
            "rollout/equal_reward_groups": float(np.clip(0.12 + 0.1 * progress + self._noise(0.04), 0, 1)),
        }

    def _losses(self, progress: float) -> Record:
        attention, kl = 0.3 - 0.12 * progress + self._noise(0.02), 0.12 * progress + abs(self._noise(0.005))
        policy = self._noise(0.02)
        return {
            "train/policy_loss": policy,
            "train/kl_loss": kl,
            "train/attention_loss": attention,
            "train/loss": policy + 0.02 * kl + self.eta * attention,
            "train/grad_norm": 0.6 + abs(self._noise(0.15)),
            "train/lr": 2.5e-4,
            "train/clip_share": abs(self._noise(0.004)),
            "train/ratio_max": 1.4 + abs(self._noise(0.3)),
            "train/entropy_nats": 0.42 - 0.12 * progress + self._noise(0.01),
        }

    def _mapo(self, progress: float) -> Record:
        mass = self.mass_gain * progress
        return {
            "mapo/audio_mass": 0.55 + 0.7 * mass + self._noise(0.01),
            "mapo/audio_mass_early": 0.66 + 0.4 * mass + self._noise(0.01),
            "mapo/audio_mass_late": 0.43 + mass + self._noise(0.01),
            "mapo/delta_h_abs_nats": 0.12 + 0.03 * progress + self._noise(0.005),
            "mapo/mask_max": 4.2 + self._noise(0.2),
            "mapo/mask_mean_max": 2.3 + self._noise(0.08),
            "mapo/mask_entropy": 0.91 + self._noise(0.006),
            "mapo/mask_capped_share": abs(self._noise(0.002)),
            "mapo/inverse_mask_max": 1.7 + self._noise(0.05),
            "mapo/gate_share": 0.52 + self._noise(0.01),
            "mapo/gate_fallbacks": 0,
            "mapo/gate_fallbacks_empty": 0,
            "mapo/prefactor": 0.45 - 0.2 * progress + self._noise(0.02),
            "mapo/term": 4e-3 + abs(self._noise(1e-3)),
            "mapo/term_attention": 3e-3 + abs(self._noise(5e-4)),
            "mapo/term_mask": self._noise(2e-3),
        }

    def _timing(self, step: int) -> Record:
        parts = {"rollout": 1.15, "rewards": 0.03, "reference": 0.42, "pos_gate": 0.05, "train": 1.32}
        seconds = {f"timing/{name}_seconds": mean * (1 + abs(self._noise(0.06))) for name, mean in parts.items()}
        if step % VALIDATE_EVERY == 0:
            seconds["timing/validation_seconds"] = 3.1
        return {**seconds, "timing/step_seconds": sum(seconds.values())}

    def _profile(self, step: int, label: str, gain: float) -> Record:
        position = (np.arange(BINS) + 0.5) / BINS
        mass = 0.7 - 0.35 * position + gain * position + self.random.normal(0, 0.012, BINS)
        text = 0.8 + 0.25 * np.sin(9 * position) + self.random.normal(0, 0.02, BINS)
        delta = (0.3 + gain) * np.exp(-2 * position) + self.random.normal(0, 0.02, BINS)
        return {
            "step": step,
            "label": label,
            "position": position.tolist(),
            "audio_mass_max": mass.tolist(),
            "audio_mass_mean": (0.45 * mass).tolist(),
            "delta_h_nats": delta.tolist(),
            "text_entropy_nats": text.tolist(),
            "policy_entropy_nats": (text - delta).tolist(),
            "count": [400] * BINS,
        }

    def _test(self) -> list[Record]:
        """1,000 questions, 430 right at the start; what is gained was wrong before."""
        end = round(1000 * (0.43 + self.gain))
        return [
            {"step": self.steps, "id": f"q{index}", "task": "attribute", "choices": 4,
             "start_correct": float(index < 430), "start_silent": float(index % 4 == 0),
             "correct": float(index < end), "silent": float(index % 4 == 0)}
            for index in range(1000)
        ]  # fmt: skip

    def _rollouts(self) -> list[Record]:
        rollouts = []
        for step in range(0, self.steps + 1, VALIDATE_EVERY):
            for index in range(6):
                rollouts.append(self._sample(step, index, right=index % 2 == 0))
        return rollouts

    def _sample(self, step: int, index: int, *, right: bool) -> Record:
        answer = ATTRIBUTES[index % 4]
        said = answer if right else ATTRIBUTES[(index + 1) % 4]
        others = " ".join(f"not {choice} ," for choice in ATTRIBUTES if choice != said)
        words = (
            f"<think> \n The clip starts with a deep tone , then a {said} sweep , and last a slow pulse . "
            f"The question asks about the sweep . {others} so the sweep seems {said} . \n </think> \n {said} <|im_end|>"
        )
        tokens = [part if part[0] in "<\n,." else f"Ġ{part}" for part in words.split(" ")]
        length = len(tokens)
        record: Record = {
            "step": step,
            "split": "validation" if index < 4 else "train",
            "id": f"clip-{index:04d}",
            "question": "How does the sweep move?",
            "choices": list(ATTRIBUTES),
            "answer": answer,
            "task": "attribute",
            "text": "".join(tokens).replace("Ġ", " ").removesuffix("<|im_end|>"),
            "reward": {
                "total": 4.0 if right else 1.0,
                "accuracy": float(right),
                "format": 1.0,
                "consistency": float(right),
            },
            "advantage": 0.8 if right else -1.1,
        }
        if index < 4:
            surprise = self.random.gamma(1.2, 0.12, length)
            gate = self.random.random(length) < 0.5
            record["tokens"] = tokens
            record["omega"] = np.minimum(5, length * np.exp(4 * surprise) / np.exp(4 * surprise).sum()).tolist()
            record["nu"] = (gate * self.random.uniform(0.5, 1.6, length)).tolist()
            record["audio_mass"] = np.clip(
                0.7 - 0.3 * np.arange(length) / length + self.random.normal(0, 0.08, length), 0, 1
            ).tolist()
            record["delta_h_nats"] = (surprise * self.random.choice([1, 1, 1, -1], length)).tolist()
        return record


def write_jsonl(path: Path, records: list[Record]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="session")
def make_run() -> type[FakeRun]:
    """The class of made-up runs."""
    return FakeRun


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A complete, healthy, made-up run."""
    return FakeRun().write(tmp_path / "run")
