"""Supervised start of the embedded run: a policy that listens early in its reasoning and leans on its text late."""

import contextlib
import dataclasses
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock
from jaxtyping import Float
from lhotse.cut import Cut
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.config.warm_start import WarmStartConfig, WarmStartStageConfig
from nemo_mapo.data.dataset import load_waveform
from nemo_mapo.data.manifests import example_from_cut, load_cuts
from nemo_mapo.data.prompts import encode_prompt
from nemo_mapo.data.sequences import response_mask
from nemo_mapo.data.synthetic_text import caption_text, events_from_custom, reasoning_text, warm_start_belief
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.training.checkpoint import load_checkpoint, write_checkpoint
from nemo_mapo.training.references import drop_audio
from nemo_mapo.training.signals import token_signals
from nemo_mapo.types import AudioBatch, TokenBatch, Wording

_RECIPE_VERSION = 3
"""Raise when the recipe below changes, so that cached results of the old one are not used."""
_CLIP_NORM = 1.0
_BETAS = (0.9, 0.95)
_WARMUP_SHARE = 0.05


def warm_start(
    model: AudioLLM,
    config: WarmStartConfig,
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    wording: Wording,
    *,
    model_seed: int,
) -> Path:
    """Give `model` its warm-start weights, from the cache or by training; return the cached checkpoint.

    Runs that need the same result at the same time wait for the first one's. The cache's key covers recipe, model,
    manifest, vocabulary, seeds and torch's version, but neither the audio files' contents nor the number of threads.
    """
    if not Path(config.cuts_path).is_file():
        raise ValueError(f"warm_start.cuts_path={config.cuts_path}: no such manifest; ~warm_start goes without")
    path = Path(config.cache_dir) / fingerprint(config, model_config, tokenizer, wording, model_seed=model_seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")) if dist.get_world_size() == 1 else contextlib.nullcontext():
        if not path.exists():
            if dist.get_world_size() > 1:
                raise ValueError(
                    f"warm_start.cache_dir={config.cache_dir} does not hold this warm start yet, and it is made by one "
                    "process: run once with trainer.devices=1 trainer.mapo.max_steps=1, or set "
                    "pretrained_checkpoint.restore_from_path"
                )
            _train(model, config, tokenizer, wording)
            write_checkpoint(path, model)
    load_checkpoint(path, model)
    return path


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


def _train(model: AudioLLM, config: WarmStartConfig, tokenizer: PreTrainedTokenizerBase, wording: Wording) -> None:
    cuts = list(load_cuts(config.cuts_path))
    maker = _BatchMaker(cuts, tokenizer, model, config, wording)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=_BETAS, weight_decay=config.weight_decay)
    total = sum(stage.steps for stage in config.stages)
    model.train()
    with tqdm(total=total, desc="warm start", unit="step", dynamic_ncols=True) as bar:
        for stage in config.stages:
            for _ in range(stage.steps):
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * _cosine_with_warmup(bar.n / total)
                loss = _supervised_loss(model, maker.batch(stage))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM, error_if_nonfinite=True)
                optimizer.step()
                bar.set_postfix(stage=stage.target, loss=f"{float(loss):.3f}", refresh=False)
                bar.update()
    # Else the last gradient is added to the first one of what comes after.
    optimizer.zero_grad()


def _supervised_loss(model: AudioLLM, sequences: TokenBatch) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of the completion tokens."""
    signals = token_signals(model, sequences, head_reduction=None)
    mask = response_mask(sequences.completion_lengths, signals.log_probs.shape[1])
    return -signals.log_probs[mask].mean()


def _cosine_with_warmup(progress: float) -> float:
    if progress < _WARMUP_SHARE:
        return (progress + 1e-3) / _WARMUP_SHARE
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARMUP_SHARE) / (1 - _WARMUP_SHARE)))


class _BatchMaker:
    """Draws cuts and writes what is to be learned about them; everything follows from the recipe's seed."""

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

    def batch(self, stage: WarmStartStageConfig) -> TokenBatch:
        """Rows of one step.

        The first come without audio, as the text-only reference reads them; the next hear a clip of silence.
        """
        chosen = self.rng.choice(len(self.cuts), size=stage.batch_size, replace=False)
        clips = [load_waveform(self.cuts[index]) for index in chosen]
        prompts, completions = [], []
        for index, clip in zip(chosen, clips, strict=True):
            example = example_from_cut(self.cuts[index])
            placeholders = self.model.num_audio_tokens(len(clip))
            prompts.append(encode_prompt(example, placeholders, self.tokenizer, self.wording))
            text = self._target(self.cuts[index], stage)
            completions.append([*self.tokenizer.encode(text, add_special_tokens=False), self.special.end_id])
        text_only = round(stage.batch_size * self.config.text_only_share)
        silent = round(stage.batch_size * self.config.silent_clip_share)
        for row in range(text_only, text_only + silent):
            clips[row] = torch.zeros_like(clips[row])
        sequences = _as_token_batch(prompts, completions, clips, self.special.pad_id)
        return _with_text_only_rows(sequences, text_only, self.special)

    def _target(self, cut: Cut, stage: WarmStartStageConfig) -> str:
        events = events_from_custom(cut.custom)
        if stage.target == "caption":
            return caption_text(events)
        example = example_from_cut(cut)
        belief = warm_start_belief(example, stage.truth_share, self.rng)
        return reasoning_text(events, example, belief, self.rng)


def _as_token_batch(
    prompts: list[list[int]], completions: list[list[int]], clips: list[Tensor], pad_id: int
) -> TokenBatch:
    rows = [torch.tensor(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]
    return TokenBatch(
        tokens=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
        completion_lengths=torch.tensor([len(completion) for completion in completions]),
        audio=AudioBatch(
            waveforms=torch.nn.utils.rnn.pad_sequence(clips, batch_first=True),
            lengths=torch.tensor([len(clip) for clip in clips]),
        ),
        audio_row=torch.arange(len(clips)),
    )


def _with_text_only_rows(sequences: TokenBatch, count: int, special: SpecialTokens) -> TokenBatch:
    """The same batch with the audio span dropped from its first `count` rows."""
    if count == 0:
        return sequences
    text = drop_audio(sequences, special)
    width = sequences.tokens.shape[1] - text.tokens.shape[1]
    text_tokens = torch.nn.functional.pad(text.tokens, (0, width), value=special.pad_id)
    without = torch.arange(len(sequences.audio_row)) < count
    return TokenBatch(
        tokens=torch.where(without[:, None], text_tokens, sequences.tokens),
        prompt_lengths=torch.where(without, text.prompt_lengths, sequences.prompt_lengths),
        completion_lengths=sequences.completion_lengths,
        audio=sequences.audio,
        audio_row=sequences.audio_row.masked_fill(without, -1),
    )
