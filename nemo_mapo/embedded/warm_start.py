"""Supervised start of the embedded run: a policy that listens early in its reasoning and later relies on its text."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from lhotse.cut import Cut
from megatron.core import parallel_state
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.model import ModelConfig, OptimizerConfig
from nemo_mapo.config.run import RunConfig
from nemo_mapo.config.warm_start import WarmStartConfig, WarmStartStageConfig
from nemo_mapo.data.dataset import load_waveform
from nemo_mapo.data.manifests import example_from_cut, load_cuts
from nemo_mapo.data.prompts import encode_prompt
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.embedded.synthetic_text import caption_text, events_from_custom, reasoning_text, warm_start_belief
from nemo_mapo.evaluation.grounding.causal import ONLY_LATE, after_text
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import MicroBatching
from nemo_mapo.processes import is_main_rank
from nemo_mapo.ranks import data_parallel_share, from_main_rank
from nemo_mapo.rewards.templates import prompt_wording
from nemo_mapo.rollout.deaf import DeafTokens
from nemo_mapo.rows import Prompt, Row
from nemo_mapo.training.checkpoint import load_checkpoint, write_checkpoint
from nemo_mapo.training.optimizer import MainWeightAdamW, cosine, wrap_data_parallel
from nemo_mapo.training.policies import build_policy
from nemo_mapo.training.supervised import supervised_gradient
from nemo_mapo.training.targets import hide_clips
from nemo_mapo.types import Wording

_RECIPE_VERSION = 3
"""Increase it whenever the recipe below changes, so that cached results of the old one are not used."""
_CLIP_NORM = 1.0
_BETAS = (0.9, 0.95)
_WARMUP_SHARE = 0.05


def start_embedded(policy: AudioLLM, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Load the weights of `config.warm_start` into a run's new policy; a `WarmStarter` (training/policies.py).

    Raises:
        ValueError: no such manifest, or a model sharded over processes and no cached result.
    """
    assert config.warm_start is not None
    warm_start(
        policy,
        config.warm_start,
        config.model,
        tokenizer,
        prompt_wording(config.data.prompt, config.rewards.template),
        build=partial(build_policy, config, tokenizer),
    )


def warm_start(
    model: AudioLLM,
    config: WarmStartConfig,
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    wording: Wording,
    *,
    build: Callable[[], AudioLLM],
) -> Path:
    """Load warm-start weights into `model`, from the cache or by training a model from `build`; return the cached file.

    Concurrent runs that need the same result wait for the first one to train it. The cache's key covers recipe, model,
    manifest, vocabulary, seeds and torch's version, but neither the audio files' contents nor the number of threads and
    data-parallel ranks.
    """
    if not Path(config.cuts_path).is_file():
        raise ValueError(f"warm_start.cuts_path={config.cuts_path}: no such manifest; ~warm_start goes without")
    path = Path(config.cache_dir) / fingerprint(config, model_config, tokenizer, wording, model_seed=config.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")) if is_main_rank() else contextlib.nullcontext():
        if not from_main_rank(path.exists()):
            _refuse_sharded(config, model_config)
            # Not `model`: a model must not be wrapped for data parallelism twice.
            write_checkpoint(path, _trained(build(), config, tokenizer, wording))
    load_checkpoint(path, model)
    return path


def _refuse_sharded(config: WarmStartConfig, model_config: ModelConfig) -> None:
    """ValueError if random weights would be drawn in another order than for the whole model, or a rank had no rows."""
    if sharded := model_config.cut_over_ranks:
        raise ValueError(
            f"warm_start.cache_dir={config.cache_dir} does not hold this warm start yet, which whole models make "
            f"(data parallelism only): run once without {', '.join(sharded)} and with trainer.mapo.max_steps=1, or set "
            "pretrained_checkpoint.restore_from_path"
        )
    fewest = min(stage.batch_size for stage in config.stages)
    if fewest < (ranks := parallel_state.get_data_parallel_world_size()):
        raise ValueError(f"warm_start.stages: batch_size={fewest} leaves some of {ranks} processes without a row")


def fingerprint(
    config: WarmStartConfig,
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    wording: Wording,
    *,
    model_seed: int,
) -> str:
    """Hash of what the warm-start weights depend on."""
    recipe = dataclasses.asdict(config)
    del recipe["cache_dir"]
    recipe["cuts_path"] = hashlib.sha256(Path(config.cuts_path).read_bytes()).hexdigest()
    depends_on = {
        "version": _RECIPE_VERSION,
        "recipe": recipe,
        "decoder": {
            key: value for key, value in dataclasses.asdict(model_config.decoder).items() if "recompute" not in key
        },
        "perception": dataclasses.asdict(model_config.perception),
        "vocabulary": tokenizer.get_vocab(),
        "wording": dataclasses.asdict(wording),
        "model_seed": model_seed,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]


def _trained(
    model: AudioLLM, config: WarmStartConfig, tokenizer: PreTrainedTokenizerBase, wording: Wording
) -> AudioLLM:
    maker = _BatchMaker(list(load_cuts(config.cuts_path)), tokenizer, model, config, wording)
    wrapped = wrap_data_parallel(model)
    settings = OptimizerConfig(lr=config.lr, betas=_BETAS, weight_decay=config.weight_decay)
    optimizer = MainWeightAdamW(wrapped, settings, decay_vectors=True)
    total = sum(stage.steps for stage in config.stages)
    model.train()
    done = 0
    with tqdm(total=total, desc="warm start", unit="step", dynamic_ncols=True, disable=not is_main_rank()) as bar:
        for stage in config.stages:
            for _ in range(stage.steps):
                optimizer.zero_grad()
                rows = maker.batch(stage)
                deaf = maker.deaf(rows, stage)
                share = list(data_parallel_share(tuple(range(stage.batch_size))))
                metrics = supervised_gradient(
                    wrapped,
                    [rows[number] for number in share],
                    MicroBatching(rows=stage.batch_size),
                    deaf=None if deaf is None else deaf.of(share),
                )
                lr = config.lr * _cosine_with_warmup(done / total)
                taken = optimizer.step(lr=lr, max_norm=_CLIP_NORM)
                if taken.fault is not None:
                    raise FloatingPointError(f"warm start, step {done}: the gradient of {taken.fault} is not finite")
                bar.set_postfix(stage=stage.target, loss=f"{metrics['train/loss']:.3f}", refresh=False)
                bar.update()
                done += 1
    return model


def _cosine_with_warmup(progress: float) -> float:
    if progress < _WARMUP_SHARE:
        return (progress + 1e-3) / _WARMUP_SHARE
    return cosine((progress - _WARMUP_SHARE) / (1 - _WARMUP_SHARE))


class _BatchMaker:
    """Draws cuts and writes their target texts, all determined by the recipe's seed."""

    def __init__(
        self,
        cuts: list[Cut],
        tokenizer: PreTrainedTokenizerBase,
        model: AudioLLM,
        config: WarmStartConfig,
        wording: Wording,
    ) -> None:
        self.cuts = cuts
        self.tokenizer = tokenizer
        self.model = model
        self.config = config
        self.wording = wording
        self.special = SpecialTokens.from_tokenizer(tokenizer)
        self.rng = np.random.default_rng(config.seed)

    def batch(self, stage: WarmStartStageConfig) -> list[Row]:
        """Rows of one step: the first without audio, as in the text-only reference, the next with a silent clip."""
        chosen = self.rng.choice(len(self.cuts), size=stage.batch_size, replace=False)
        rows = [self._row(self.cuts[index], stage) for index in chosen]
        hidden = hide_clips(rows, range(stage.batch_size), stage.batch_size, self.config, self.special)
        # A clip that no placeholder stands for is encoded too: the last bits depend on which are encoded together.
        return [
            replace(row, prompt=replace(row.prompt, clips=row.prompt.clips or whole.prompt.clips))
            for row, whole in zip(hidden, rows, strict=True)
        ]

    def deaf(self, rows: Sequence[Row], stage: WarmStartStageConfig) -> DeafTokens | None:
        """The deaf tokens of a step: in its last rows, everything up to the end of the first sentence."""
        count = round(stage.batch_size * stage.only_late_share)
        if count == 0:
            return None
        parts = after_text([row.token_ids.tolist() for row in rows], self.tokenizer, ".")
        hearing = torch.arange(stage.batch_size) < stage.batch_size - count
        deaf = parts.deaf(ONLY_LATE, ())
        return replace(deaf, end=deaf.end.masked_fill(hearing, 0), text_rows=~hearing)

    def _row(self, cut: Cut, stage: WarmStartStageConfig) -> Row:
        example, clip = example_from_cut(cut), load_waveform(cut)
        ids = encode_prompt(example, self.model.num_audio_tokens(len(clip)), self.tokenizer, self.wording)
        target = self.tokenizer.encode(self._target(cut, stage), add_special_tokens=False)
        prompt = Prompt(id=example.id, token_ids=torch.tensor(ids), clips=(clip,))
        return Row(prompt=prompt, token_ids=torch.tensor([*target, self.special.end_id]))

    def _target(self, cut: Cut, stage: WarmStartStageConfig) -> str:
        if stage.target == "caption":
            return caption_text(events_from_custom(cut.custom))
        example = example_from_cut(cut)
        if stage.target == "manifest":
            if example.reasoning is None:
                raise ValueError(f"cut {cut.id}: no 'reasoning', which warm_start stages of target=manifest learn")
            return example.reasoning
        belief = warm_start_belief(example, stage.truth_share, self.rng)
        return reasoning_text(events_from_custom(cut.custom), example, belief, self.rng)
