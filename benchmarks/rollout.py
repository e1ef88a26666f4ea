"""Completion tokens per second of the Megatron backend, vLLM and transformers: `python benchmarks/rollout.py`.

All have the same weights (a small Qwen3-style decoder), the same prompts, sampling, stop tokens and number of slots.
Lengths are unequal as real ones are: a completion ends where one of the stop tokens is drawn. Runs alternate; a ratio
is the median over rounds.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from nemo_mapo.config.model import DecoderConfig, ModelConfig
from nemo_mapo.config.rollout import VllmConfig
from nemo_mapo.config.run import RolloutConfig, SamplingConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.hf.weights import WeightMap
from nemo_mapo.models.layout import left_padded
from nemo_mapo.models.tensors import policy_tensors
from nemo_mapo.platform import hide_cuda_devices, initialize_parallel, install_cpu_host
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rollout.protocol import RolloutBackend
from nemo_mapo.rollout.vllm.backend import VllmRollout
from nemo_mapo.rollout.vllm.build import build_vllm
from nemo_mapo.rows import Prompt
from nemo_mapo.training.build import build_audio_llm

WANTED = 2.0
SAMPLE_RATE = 16000
SHORTEST_PROMPT, LONGEST_PROMPT = 24, 96
STOP_SHARE = 40
"""One token in this many ends a completion."""


def main() -> None:
    """Time rounds of runs and print a table; with --check fail below the wanted ratio."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    hide_cuda_devices()
    install_cpu_host()
    initialize_parallel()
    tokenizer = build_tokenizer()
    ours, theirs = build_pair(tokenizer, layers=arguments.layers, width=arguments.width)
    prompts, stops = draw_prompts(tokenizer, arguments.prompts), stop_tokens(tokenizer)
    rounds = []
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(vllm(ours, tokenizer, stops, arguments, Path(folder))) as served,
    ):
        print_update(served, ours)
        for number in range(arguments.pairs + 1 if arguments.pairs else 0):
            seeds = torch.arange(len(prompts) * arguments.group) + 1000 * number
            megatron = MegatronRollout(ours, tokenizer, batch_size=arguments.slots, stop_token_ids=stops)
            rounds.append(
                {
                    "Megatron backend": rate(megatron, prompts, seeds, arguments),
                    "vLLM": rate(served, prompts, seeds, arguments),
                    "transformers": transformers_rate(theirs, tokenizer, prompts, stops, arguments, 1000 * number),
                }
            )
    # The first round is a warm-up.
    if rounds[1:]:
        report(rounds[1:], check=arguments.check)


def model_config_of(layers: int, width: int, *, positions: int = 1024) -> ModelConfig:
    """A decoder with heads 32 wide, which vLLM's attention on a CPU has."""
    decoder = DecoderConfig(
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=3 * width,
        num_attention_heads=width // 32,
        num_query_groups=max(1, width // 64),
        kv_channels=32,
        max_position_embeddings=positions,
    )
    return ModelConfig(decoder=decoder, target_layers=(layers - 1,))


def build_pair(
    tokenizer: PreTrainedTokenizerBase, *, layers: int, width: int, positions: int = 1024
) -> tuple[AudioLLM, Qwen3ForCausalLM]:
    """The same decoder as ours and as transformers' Qwen3."""
    config = model_config_of(layers, width, positions=positions)
    decoder = config.decoder
    ours = build_audio_llm(
        config,
        vocab_size=len(tokenizer),
        special=SpecialTokens.from_tokenizer(tokenizer),
        sample_rate=SAMPLE_RATE,
        seed=0,
    ).eval()
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=decoder.num_attention_heads,
            num_key_value_heads=decoder.num_query_groups,
            head_dim=decoder.kv_channels,
            max_position_embeddings=positions,
            rope_theta=decoder.rotary_base,
            rms_norm_eps=decoder.layernorm_epsilon,
            tie_word_embeddings=True,
        )
    ).eval()
    weights = WeightMap(decoder, prefix="")
    state = {}
    for name, value in ours.state_dict().items():
        if name.startswith("language_model.") and isinstance(value, torch.Tensor):
            source = weights.source(name)
            state |= dict(zip(source.theirs, source.layout.split(value), strict=True))
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    return ours, theirs


def draw_prompts(tokenizer: PreTrainedTokenizerBase, count: int) -> list[Prompt]:
    """Text-only prompts of random words and unequal lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST_PROMPT, LONGEST_PROMPT, (count,), generator=generator)
    words = torch.randint(len(tokenizer) // 2, len(tokenizer) - 2, (count, int(lengths.max())), generator=generator)
    return [Prompt(id=str(row), token_ids=words[row, :length]) for row, length in enumerate(lengths.tolist())]


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end of turn, and words spread over the vocabulary."""
    return [SpecialTokens.from_tokenizer(tokenizer).end_id, *range(20, len(tokenizer) - 2, STOP_SHARE)]


def sampling_of(arguments: argparse.Namespace) -> SamplingConfig:
    """The paper's."""
    return SamplingConfig(temperature=1.2, top_k=50, top_p=0.99, max_new_tokens=arguments.max_new_tokens)


def vllm(
    model: AudioLLM,
    tokenizer: PreTrainedTokenizerBase,
    stops: list[int],
    arguments: argparse.Namespace,
    directory: Path,
) -> VllmRollout:
    """A server of the same decoder, with its weights."""
    settings = VllmConfig(python=arguments.python, serve_args=tuple(arguments.serve_args.split()))
    config = RolloutConfig(backend="vllm", batch_size=arguments.slots, sampling=sampling_of(arguments), vllm=settings)
    model_config = model_config_of(arguments.layers, arguments.width)
    backend = build_vllm(config, model_config, model, tokenizer, sample_rate=SAMPLE_RATE, directory=directory)
    forbidden = set(backend.drawing.never_drawn) - set(stops)
    backend.drawing = replace(backend.drawing, never_drawn=tuple(sorted(forbidden)), stop_ids=tuple(stops))
    backend.fleet.wait_for_a_server()
    return backend


def print_update(backend: VllmRollout, model: AudioLLM) -> None:
    """Seconds of weight updates after the first, the probe included."""
    seconds = []
    for version in range(4):
        started = time.perf_counter()
        backend.update_weights(version, policy_tensors(model))
        seconds.append(time.perf_counter() - started)
    megabytes = sum(value.nbytes for _, value in policy_tensors(model)) / 2**20
    print(f"weight update      {statistics.median(seconds[1:]):8.2f} s for {megabytes:.0f} MiB")


def rate(backend: RolloutBackend, prompts: list[Prompt], seeds: Tensor, arguments: argparse.Namespace) -> float:
    """Tokens per second of one call for all prompts."""
    started = time.perf_counter()
    groups = backend.generate(prompts, sampling_of(arguments), group_size=arguments.group, seeds=seeds)
    return sum(len(one) for group in groups for one in group) / (time.perf_counter() - started)


@torch.no_grad()
def transformers_rate(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    stops: list[int],
    arguments: argparse.Namespace,
    seed: int,
) -> float:
    """Tokens per second of calls for as many completions as there are slots; prompts sorted by length, padded left."""
    sampling, special = sampling_of(arguments), SpecialTokens.from_tokenizer(tokenizer)
    forbidden = sorted(set(tokenizer.all_special_ids) - set(stops))
    slots = [prompt for prompt in sorted(prompts, key=len) for _ in range(arguments.group)]
    torch.manual_seed(seed)
    tokens = 0
    started = time.perf_counter()
    for start in range(0, len(slots), arguments.slots):
        ids, mask = left_padded(slots[start : start + arguments.slots], pad_id=special.pad_id)
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=stops,
            pad_token_id=special.pad_id,
            suppress_tokens=forbidden,
        )[:, ids.shape[1] :]
        ended = torch.isin(generated, torch.tensor(stops))
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, generated.shape[1])
        tokens += int(lengths.sum())
    return tokens / (time.perf_counter() - started)


def report(rounds: list[dict[str, float]], *, check: bool) -> None:
    """Medians of each, and of the Megatron backend's and vLLM's ratios to transformers."""
    for name in rounds[0]:
        print(f"{name:<18} {statistics.median(one[name] for one in rounds):8.0f} completion tokens/s")
    for name in ("Megatron backend", "vLLM"):
        ratios = sorted(one[name] / one["transformers"] for one in rounds)
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}, {len(rounds)} rounds"
        print(f"{name} / transformers: {statistics.median(ratios):.2f} ({spread})")
    ratio = statistics.median(one["Megatron backend"] / one["transformers"] for one in rounds)
    if check and ratio < WANTED:
        sys.exit(f"asked for is at least {WANTED:g}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, meaning in (
        ("prompts", 64, "prompts of a call"),
        ("group", 8, "completions per prompt"),
        ("slots", 64, "completions generated together"),
        ("max-new-tokens", 256, "longest completion"),
        ("layers", 4, "decoder layers"),
        ("width", 128, "hidden size"),
        ("pairs", 5, "rounds of runs, after one to warm up; 0 times weight updates only"),
        ("threads", 1, "torch threads"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument(
        "--python", default=".venv-vllm/bin/python", help="interpreter that has vLLM (default: %(default)s)"
    )
    parser.add_argument("--serve-args", default="", help="further arguments of `vllm serve`")
    parser.add_argument("--check", action="store_true", help=f"fail below a ratio of {WANTED:g}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
