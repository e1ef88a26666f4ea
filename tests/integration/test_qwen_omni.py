"""Qwen Omni thinkers in and out: imported, a model computes what transformers does; exported, it is the same again."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from integration.qwen_omni_tiny import (
    FAMILIES,
    TALKER,
    WINDOW_SECONDS,
    Family,
    Row,
    TinyHf,
    clip,
    hf_greedy,
    hf_logits,
    imported_model,
    our_logits,
    prompts_of,
    row,
    save_tiny,
    tensors_of,
)
from packaging.version import Version
from safetensors.torch import load_file
from transformers import Qwen2_5OmniForConditionalGeneration, Qwen3OmniMoeForConditionalGeneration

from nemo_mapo.config.adapters import LoraConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.data.prompts import without_audio
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.hf.adapters import export_adapters
from nemo_mapo.models.hf.convert import CHECKPOINT, ORIGINAL, export_hf, import_hf
from nemo_mapo.models.lora import add_lora, merged_state_dict
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rows import Prompt
from nemo_mapo.training.checkpoint import write_checkpoint
from support.tiny import tiny_tokenizer

pytestmark = pytest.mark.integration

CLASSES = {
    "qwen2_5_omni": Qwen2_5OmniForConditionalGeneration,
    "qwen3_omni_moe": Qwen3OmniMoeForConditionalGeneration,
}
TOLERANCE = 1e-4
SHORT, TAIL, LONG = 9000, 24123, 16000 * 2 * WINDOW_SECONDS + 77
"""Samples: less than a chunk of either encoder, one and a half, and more than two windows of attention."""
NEW_TOKENS = 12
TRANSFORMERS_5 = Version(transformers.__version__).major >= 5


@dataclass(frozen=True)
class Pair:
    hf: TinyHf
    imported: Path
    ours: AudioLLM


Make = Callable[[Family, int], Pair]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    install_cpu_host()
    initialize_parallel()

    @cache
    def pair(family: Family, seed: int) -> Pair:
        folder = tmp_path_factory.mktemp(family)
        hf = save_tiny(folder / "original", family, seed=seed)
        import_hf(hf.directory, folder / "imported")
        return Pair(hf, folder / "imported", imported_model(folder / "imported"))

    return pair


@pytest.fixture(params=[(family, seed) for family in FAMILIES for seed in (0, 1, 2)], ids=str)
def pair(request: pytest.FixtureRequest, make: Make) -> Pair:
    return make(*request.param)


@pytest.fixture(params=FAMILIES)
def first(request: pytest.FixtureRequest, make: Make) -> Pair:
    return make(request.param, 0)


def cases(family) -> dict[str, Row]:
    return {
        "text only": row(family, 9),
        "audio first": row(family, clip(SHORT), 6),
        "audio in the middle": row(family, 4, clip(TAIL), 5),
        "audio last": row(family, 3, clip(LONG)),
        "two clips": row(family, 2, clip(TAIL, seed=1), 3, clip(SHORT, seed=2), 4),
        "two clips of one length, side by side": row(family, 2, clip(SHORT, seed=3), clip(SHORT, seed=4), 1),
    }


def difference(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    assert [one.shape for one in found] == [one.shape for one in wanted]
    assert wanted[0].std() > 0.5, "logits that hardly differ would agree with anything"
    return max(float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", cases("qwen2_5_omni"))
def test_logits_of_one_prompt_are_those_of_transformers(pair: Pair, name: str) -> None:
    rows = [cases(pair.hf.family)[name]]
    assert difference(our_logits(pair.ours, rows), hf_logits(pair.hf, rows)) <= TOLERANCE


def test_logits_of_a_batch_of_unequal_lengths_are_those_of_transformers(pair: Pair) -> None:
    rows = list(cases(pair.hf.family).values())
    assert len({len(ids) for ids, _ in rows}) > 3
    assert difference(our_logits(pair.ours, rows), hf_logits(pair.hf, rows)) <= TOLERANCE


def test_a_clip_of_40_seconds_goes_through_qwen3s_windows_and_is_refused_by_qwen2_5s_features(
    make: Make,
) -> None:
    pair, samples = make("qwen3_omni_moe", 0), 40 * 16000
    rows = [row("qwen3_omni_moe", 3, clip(samples), 2)]
    # Thirteen tokens a second.
    assert pair.ours.num_audio_tokens(samples) == 40 * 13
    found = our_logits(pair.ours, rows)
    assert difference(found, hf_logits(pair.hf, rows)) <= TOLERANCE
    quieter = [(rows[0][0], [torch.cat([rows[0][1][0][: 39 * 16000], torch.zeros(16000)])])]
    assert difference(our_logits(pair.ours, quieter), found) > 100 * TOLERANCE, "the last second is heard"
    with pytest.raises(ValueError, match="longer than the 30 s"):
        make("qwen2_5_omni", 0).ours.num_audio_tokens(samples)


@pytest.mark.parametrize("samples", [SHORT, TAIL])
def test_a_clip_within_one_window_needs_no_care_in_transformers(pair: Pair, samples: int) -> None:
    rows = [row(pair.hf.family, 3, clip(samples), 5)]
    assert difference(our_logits(pair.ours, rows), hf_logits(pair.hf, rows, as_upstream=True)) <= TOLERANCE


def test_the_text_only_reference_is_the_model_given_the_text_alone(pair: Pair) -> None:
    ids, _ = row(pair.hf.family, 4, clip(TAIL), 5)
    heard = Prompt(id="one", token_ids=torch.tensor(ids))
    text = without_audio(heard, SpecialTokens.from_tokenizer(tiny_tokenizer())).token_ids.tolist()
    assert len(text) == 9 < len(ids)
    assert difference(our_logits(pair.ours, [(text, [])]), hf_logits(pair.hf, [(text, [])])) <= TOLERANCE


def test_the_greedy_continuation_is_that_of_transformers(pair: Pair) -> None:
    rows = [row(pair.hf.family, 4, clip(TAIL, seed=5), 5, seed=seed) for seed in range(3)] + [
        row(pair.hf.family, 2, clip(SHORT, seed=6), 7),
        row(pair.hf.family, 2, clip(SHORT, seed=6), 3, clip(TAIL, seed=7), 4),
    ]
    if pair.hf.family == "qwen3_omni_moe":
        rows.append(row(pair.hf.family, 2, clip(40 * 16000, seed=8), 5))
    generated = MegatronRollout(pair.ours, tiny_tokenizer(), batch_size=4).generate(
        prompts_of(rows),
        SamplingConfig(temperature=0.0, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS),
        group_size=1,
        seeds=torch.arange(len(rows)),
    )
    assert [one.token_ids.tolist() for (one,) in generated] == [hf_greedy(pair.hf, row, NEW_TOKENS) for row in rows]
    assert len({token for (one,) in generated for token in one.token_ids.tolist()}) > 2


def test_what_is_exported_is_what_was_imported_bit_for_bit(first: Pair, tmp_path: Path) -> None:
    done = export_hf(first.imported / CHECKPOINT, first.hf.directory, tmp_path / "exported")
    before, after = tensors_of(first.hf.directory), tensors_of(tmp_path / "exported")
    assert list(before) and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert done.tensors + done.left_aside == len(before)
    assert TALKER.keys() <= after.keys()
    rows = [cases(first.hf.family)["audio in the middle"]]
    again = TinyHf(
        family=first.hf.family, directory=tmp_path / "exported", thinker=loaded(first.hf.family, tmp_path / "exported")
    )
    assert torch.equal(hf_logits(again, rows)[0], hf_logits(first.hf, rows)[0])


def test_a_thinker_alone_is_exported_with_what_import_kept(first: Pair, tmp_path: Path) -> None:
    done = export_hf(first.imported / CHECKPOINT, first.imported / ORIGINAL, tmp_path / "out", thinker_only=True)
    before, after = tensors_of(first.hf.directory), tensors_of(tmp_path / "out")
    assert done.left_aside == 0
    assert after.keys() == {name for name in before if not name.startswith((*TALKER, "thinker.visual."))}
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_adapters_are_merged_on_export(first: Pair, tmp_path: Path) -> None:
    adapted = imported_model(first.imported)
    lora = LoraConfig(rank=2, alpha=6.0)
    add_lora(adapted.language_model, lora, seed=0)
    for name, parameter in adapted.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1)
    write_checkpoint(tmp_path / "adapted", adapted)
    with pytest.raises(ValueError, match=r"adapted holds LoRA adapters: give the run's model.lora.alpha"):
        export_hf(tmp_path / "adapted", first.hf.directory, tmp_path / "refused")
    export_hf(tmp_path / "adapted", first.hf.directory, tmp_path / "exported", lora_alpha=lora.alpha)
    import_hf(tmp_path / "exported", tmp_path / "again")
    merged = merged_state_dict(adapted.language_model)
    found = imported_model(tmp_path / "again").language_model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in merged.items() if tensor is not None)
    before = first.ours.language_model.state_dict()["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert not torch.equal(before, found["decoder.layers.0.self_attention.linear_qkv.weight"])


def test_adapters_in_pefts_format_make_the_trained_model_of_the_original(first: Pair, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="pip install -e '.[dev]'")
    if TRANSFORMERS_5 and first.hf.family == "qwen3_omni_moe":
        pytest.skip("transformers 5 fuses a layer's experts, so adapters of single experts load only in transformers 4")
    adapted = imported_model(first.imported)
    add_lora(adapted.language_model, LoraConfig(rank=2, alpha=6.0), seed=0)
    for name, parameter in adapted.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1)
    write_checkpoint(tmp_path / "adapted", adapted)
    export_adapters(tmp_path / "adapted", first.hf.directory, tmp_path / "adapters", lora_alpha=6.0)
    whole = CLASSES[first.hf.family].from_pretrained(first.hf.directory)
    renamed = {"^thinker.model.": "thinker.model.language_model."} if TRANSFORMERS_5 else {}
    loaded = peft.PeftModel.from_pretrained(whole, tmp_path / "adapters", key_mapping=renamed)
    written = load_file(tmp_path / "adapters" / "adapter_model.safetensors").keys()
    assert {name.replace(".language_model.", ".") for name in peft.get_peft_model_state_dict(loaded)} == written
    rows = list(cases(first.hf.family).values())
    trained = TinyHf(
        family=first.hf.family, directory=first.hf.directory, thinker=loaded.base_model.model.thinker.eval()
    )
    found = our_logits(adapted, rows)
    assert difference(found, hf_logits(trained, rows)) <= TOLERANCE
    assert difference(found, hf_logits(first.hf, rows)) > 100 * TOLERANCE
    with torch.no_grad():
        adapted.perception.module.ln_post.weight.add_(1)
    write_checkpoint(tmp_path / "more", adapted)
    with pytest.raises(ValueError, match=r"audio_tower.ln_post.weight is not that of .*; adapters alone"):
        export_adapters(tmp_path / "more", first.hf.directory, tmp_path / "refused", lora_alpha=6.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head_and_bfloat16_survive_the_way_in_and_out(family, tmp_path: Path) -> None:
    install_cpu_host()
    initialize_parallel()
    hf = save_tiny(tmp_path / "original", family, dtype=torch.bfloat16, tie_word_embeddings=True)
    before = tensors_of(hf.directory)
    assert "thinker.lm_head.weight" not in before
    import_hf(hf.directory, tmp_path / "imported")
    export_hf(tmp_path / "imported" / CHECKPOINT, hf.directory, tmp_path / "exported")
    after = tensors_of(tmp_path / "exported")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    hf.thinker.float()
    rows = [cases(family)["audio in the middle"]]
    assert difference(our_logits(imported_model(tmp_path / "imported"), rows), hf_logits(hf, rows)) <= TOLERANCE


def loaded(family, directory: Path):
    return CLASSES[family].from_pretrained(directory, local_files_only=True).thinker.eval()
