"""What the ranks of the warm-start test run; apart, because a rank imports it by name and no test file."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from nemo_mapo.config.warm_start import WarmStartConfig, WarmStartStageConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.embedded.warm_start import warm_start
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.training.build import build_audio_llm
from nemo_mapo.types import Wording
from support.tiny import SAMPLE_RATE, tiny_model_config


def started(cuts: str, cache: str, tensor_ranks: int) -> tuple[dict[str, Tensor], list[str]] | str:
    """The weights after a warm start and the files in its cache, or why there are none."""
    install_cpu_host()
    initialize_parallel(tensor=tensor_ranks)
    tokenizer = build_tokenizer()
    model = replace(tiny_model_config(), tensor_model_parallel_size=tensor_ranks)
    stages = (WarmStartStageConfig(target="reasoning", steps=3, batch_size=5, only_late_share=0.4),)
    config = WarmStartConfig(cuts_path=cuts, stages=stages, lr=1e-2, text_only_share=0.2, cache_dir=cache)

    def build() -> AudioLLM:
        special = SpecialTokens.from_tokenizer(tokenizer)
        return build_audio_llm(model, vocab_size=len(tokenizer), special=special, sample_rate=SAMPLE_RATE, seed=0)

    policy = build()
    try:
        warm_start(policy, config, model, tokenizer, Wording(), build=build)
    except ValueError as error:
        return str(error)
    return {name: value.detach() for name, value in policy.named_parameters()}, sorted(
        path.name for path in Path(cache).iterdir()
    )
