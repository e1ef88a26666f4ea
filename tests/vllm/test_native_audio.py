"""Qwen Omni thinkers served whole: vLLM hears the clip itself, and draws what the policy and transformers draw."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from nemo_mapo.config.model import ModelConfig, QwenOmniPerceptionConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.hf.convert import ORIGINAL, import_hf
from nemo_mapo.models.hf.models import read_model
from nemo_mapo.models.layout import MicroBatching
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rollout.scoring import Drawing
from nemo_mapo.rollout.vllm.backend import VllmRollout
from nemo_mapo.rollout.vllm.build import build_vllm
from nemo_mapo.rows import Row
from nemo_mapo.training.signals import token_signals_in_parts
from support.tiny import tiny_tokenizer
from tests.integration.qwen_omni_tiny import (
    HOP,
    SAMPLE_RATE,
    Family,
    TinyHf,
    clip,
    hf_greedy,
    imported_model,
    prompts_of,
    row,
    save_tiny,
)
from tests.vllm.serving import PYTHON, named_tensors, rollout_config

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SHORT, LONG = 9000, 24123
NEW_TOKENS = 12
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=NEW_TOKENS)
PAPER = SamplingConfig(temperature=1.2, top_k=20, top_p=0.95, repetition_penalty=1.1, max_new_tokens=NEW_TOKENS)
HEADS = {
    "qwen2_5_omni": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "qwen3_omni_moe": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
}
"""32 wide, which vLLM's attention on a CPU has; the experts are narrower than its kernels, which pads them."""
ROPE = {"rope_type": "default", "type": "default", "mrope_section": [8, 4, 4]}


@dataclass(frozen=True)
class Served:
    """A tiny thinker with two sets of weights, and a server of it."""

    family: Family
    hfs: tuple[TinyHf, TinyHf]
    imported: tuple[Path, Path]
    policy: AudioLLM
    config: ModelConfig
    backend: VllmRollout


@pytest.fixture(scope="module", params=["qwen2_5_omni", "qwen3_omni_moe"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    install_cpu_host()
    initialize_parallel()
    family: Family = request.param
    folder = tmp_path_factory.mktemp(family)
    hfs, imported = [], []
    for seed in range(2):
        hf = save_tiny(folder / f"original {seed}", family, seed=seed, **HEADS[family], rope_scaling=ROPE)
        import_hf(hf.directory, folder / f"imported {seed}")
        hfs.append(hf)
        imported.append(folder / f"imported {seed}")
    script = Path(__file__).parent / "make_processor.py"
    subprocess.run([str(PYTHON), str(script), str(imported[0] / ORIGINAL), family], check=True)
    config = replace(read_model(imported[0] / ORIGINAL).config, target_layers=(2,))
    assert isinstance(config.perception, QwenOmniPerceptionConfig)
    config = replace(config, perception=replace(config.perception, whole_frames=family == "qwen3_omni_moe"))
    policy = imported_model(imported[0], {"perception": config.perception})
    rollout = rollout_config(folder / "vllm", original=str(imported[0] / ORIGINAL))
    backend = build_vllm(rollout, config, policy, tiny_tokenizer(), sample_rate=SAMPLE_RATE, directory=folder / "vllm")
    try:
        backend.fleet.wait_for_a_server()
        yield Served(family, (hfs[0], hfs[1]), (imported[0], imported[1]), policy, config, backend)
    finally:
        backend.close()


def filled(family: Family, waveform: torch.Tensor) -> torch.Tensor:
    """A clip as vLLM reads it: of Qwen3-Omni's family with zeros to whole frames."""
    return waveform if family == "qwen2_5_omni" else torch.nn.functional.pad(waveform, (0, -len(waveform) % HOP))


def test_before_and_after_an_update_greedy_tokens_are_ours_and_transformers(served: Served) -> None:
    tokenizer = tiny_tokenizer()
    short, long = clip(SHORT), clip(LONG)
    clips = ([short], [long], [])
    rows = [
        row(served.family, 3, filled(served.family, short), 5),
        row(served.family, filled(served.family, long), 6),
        row(served.family, 9),
    ]
    # One clip is heard before the update and after it.
    for version, (hf, imported) in enumerate(zip(served.hfs, served.imported, strict=True)):
        served.policy.load_state_dict(imported_model(imported).state_dict())
        served.backend.update_weights(version, named_tensors(served.policy))
        for prompt, unfilled in zip(rows, clips, strict=True):
            batch = prompts_of([(prompt[0], unfilled)])
            ((greedy,),) = served.backend.generate(batch, GREEDY, group_size=1, seeds=torch.zeros(1, dtype=torch.int64))
            ((ours,),) = MegatronRollout(served.policy, tokenizer, batch_size=4).generate(
                batch, GREEDY, group_size=1, seeds=torch.zeros(1, dtype=torch.int64)
            )
            assert torch.equal(greedy.token_ids, ours.token_ids)
            if SpecialTokens.from_tokenizer(tokenizer).end_id not in greedy.token_ids:
                assert greedy.token_ids.tolist() == hf_greedy(hf, prompt, NEW_TOKENS)
            (sampled,) = served.backend.generate(batch, PAPER, group_size=4, seeds=torch.arange(4))
            signals = token_signals_in_parts(
                served.policy,
                [Row(prompt=batch[0], token_ids=one.token_ids) for one in sampled],
                head_reduction=None,
                batching=MicroBatching(rows=4),
                drawing=Drawing.of(PAPER, tokenizer, served.policy.vocab_size),
            )
            stated, drawn = [one.sampling_log_probs for one in sampled], [one.drawn_log_probs for one in signals]
            torch.testing.assert_close(stated, drawn, rtol=0, atol=2e-4)


def test_a_prompt_that_vllm_reads_as_another_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.backend.update_weights(9, named_tensors(served.policy))
    (prompt,) = prompts_of([row(served.family, 3, filled(served.family, clip(SHORT)), 5)])
    (whole,) = prompt.clips
    shorter = replace(prompt, clips=(whole[: len(whole) // 2],))
    with pytest.raises(RuntimeError, match=r"vLLM read a prompt of .* another than that of"):
        served.backend.generate([shorter], GREEDY, group_size=1, seeds=torch.zeros(1, dtype=torch.int64))
