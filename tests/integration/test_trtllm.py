"""The TensorRT-LLM backend on an engine that a Megatron decoder plays: everything but TensorRT-LLM itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_mapo.config.rollout import TrtllmConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import PADDED_ROWS
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rollout.protocol import RolloutBackend
from nemo_mapo.rollout.trtllm.backend import TrtllmRollout
from nemo_mapo.rollout.trtllm.calls import TrtllmEngine
from nemo_mapo.rollout.trtllm.scoring import restriction
from nemo_mapo.rows import Completion, Prompt, Row
from nemo_mapo.training.trainer import MapoTrainer
from support.tiny import CONTROL_TOKENS, TinyAudioLLM, tiny_audio_llm, tiny_prompts
from support.trtllm_runtime import MegatronRuntime
from tests.integration.tiny_run import metrics, write_tiny_corpus
from tests.integration.trainers import fit, trainer_of

pytestmark = pytest.mark.integration

GROUP = 3
GREEDY = SamplingConfig(temperature=0, max_new_tokens=10)
PAPER = SamplingConfig(temperature=1.2, top_k=8, top_p=0.9, max_new_tokens=10)
FEW_ROWS = TrtllmConfig(max_prompt_embedding_table_size=20, scoring_batch_size=5)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module", params=[True, False], ids=["tied head", "untied head"])
def tiny(request: pytest.FixtureRequest) -> TinyAudioLLM:
    return tiny_audio_llm(tied=request.param, qk_layernorm=False)


@pytest.fixture(scope="module", params=["unequal", "some without audio"])
def prompts(request: pytest.FixtureRequest, tiny: TinyAudioLLM) -> list[Prompt]:
    return tiny_prompts(tiny, num_prompts=5, without_audio=() if request.param == "unequal" else (0, 3))


def backend(tiny: TinyAudioLLM, config: TrtllmConfig = FEW_ROWS, *, batch_size: int = 3 * GROUP) -> TrtllmRollout:
    engine = MegatronRuntime(
        tiny.config,
        vocab_size=tiny.model.vocab_size,
        max_batch_size=batch_size,
        max_prompt_embedding_table_size=config.max_prompt_embedding_table_size,
    )
    return TrtllmRollout(engine, tiny.model, tiny.tokenizer, config, batch_size=batch_size)


def loaded(tiny: TinyAudioLLM, version: int = 4, **options: int) -> TrtllmRollout:
    rollout = backend(tiny, **options)
    rollout.update_weights(version, ())
    return rollout


def seeds(prompts: list[Prompt]) -> Tensor:
    return torch.arange(len(prompts) * GROUP) + 2**40


def generated(rollout: RolloutBackend, prompts: list[Prompt], sampling: SamplingConfig) -> list[Completion]:
    groups = rollout.generate(prompts, sampling, group_size=GROUP, seeds=seeds(prompts))
    return [one for group in groups for one in group]


def training_logits(tiny: TinyAudioLLM, prompts: list[Prompt], completions: list[Completion], row: int) -> Tensor:
    """Logits that predict a completion's tokens, from the training forward over its row alone."""
    prompt = prompts[row // GROUP]
    alone = PADDED_ROWS.lay_out([Row(prompt=prompt, token_ids=completions[row].token_ids)], tiny.model)
    with torch.no_grad():
        logits = tiny.model(alone.tokens, alone.audio, alone.audio_row).logits
    return logits[0, len(prompt) - 1 : -1]


def test_it_is_a_rollout_backend_on_an_engine(tiny: TinyAudioLLM) -> None:
    rollout = backend(tiny)
    assert isinstance(rollout, RolloutBackend) and isinstance(rollout.engine, TrtllmEngine)


def test_greedy_completions_are_those_of_the_megatron_backend(tiny: TinyAudioLLM, prompts: list[Prompt]) -> None:
    found = generated(loaded(tiny), prompts, GREEDY)
    expected = generated(MegatronRollout(tiny.model, tiny.tokenizer, batch_size=64), prompts, GREEDY)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        assert (one.stopped, one.text) == (other.stopped, other.text)
        assert torch.equal(one.sampling_log_probs, other.sampling_log_probs)
        torch.testing.assert_close(one.log_probs, other.log_probs, **TOLERANCE)


def test_sampled_completions_have_the_log_probs_of_model_and_engine(tiny: TinyAudioLLM, prompts: list[Prompt]) -> None:
    found = generated(loaded(tiny), prompts, PAPER)
    never = torch.tensor([tiny.token_id(token) for token in CONTROL_TOKENS if token != "<|end|>"])
    assert len(set(map(len, found))) > 1, "some must stop before others"
    for row, one in enumerate(found):
        logits, tokens = training_logits(tiny, prompts, found, row), one.token_ids
        scaled = (logits.index_fill(1, never, -torch.inf) / PAPER.temperature).log_softmax(-1)
        drawn_from = scaled.gather(1, tokens[:, None])[:, 0] + restriction(scaled, tokens, top_k=8, top_p=0.9)
        model = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(one.log_probs, model, **TOLERANCE)
        torch.testing.assert_close(one.sampling_log_probs, drawn_from, **TOLERANCE)
        assert one.stopped == (int(tokens[-1]) == tiny.token_id("<|end|>"))


def test_a_completion_follows_from_its_own_seed(tiny: TinyAudioLLM, prompts: list[Prompt]) -> None:
    together = generated(loaded(tiny), prompts, PAPER)
    alone = loaded(tiny, batch_size=1).generate(
        prompts, PAPER, group_size=1, seeds=seeds(prompts).view(-1, GROUP)[:, 1].contiguous()
    )
    for (one,), other in zip(alone, together[1::GROUP], strict=True):
        assert torch.equal(one.token_ids, other.token_ids)


def test_the_policy_is_left_as_it_was(tiny: TinyAudioLLM, prompts: list[Prompt]) -> None:
    tiny.model.train()
    tiny.model.perception.eval()
    before = {name: value.clone() for name, value in tiny.model.state_dict().items() if isinstance(value, Tensor)}
    generated(loaded(tiny), prompts, PAPER)
    assert tiny.model.training and not tiny.model.perception.training
    assert all(torch.equal(value, before[name]) for name, value in tiny.model.state_dict().items() if name in before)


def test_completions_say_which_weights_they_are_from_and_old_ones_are_seen() -> None:
    tiny = tiny_audio_llm(qk_layernorm=False)
    prompts = tiny_prompts(tiny)
    rollout = loaded(tiny, version=4)
    assert (rollout.weight_version, generated(rollout, prompts, GREEDY)[0].weight_version) == (4, 4)

    with torch.no_grad():
        tiny.model.language_model.decoder.final_layernorm.weight.mul_(1.5)
    stale = generated(rollout, prompts, GREEDY)
    assert mismatch(tiny, prompts, stale) > 0.1
    rollout.update_weights(5, ())
    fresh = generated(rollout, prompts, GREEDY)
    assert fresh[0].weight_version == 5
    assert mismatch(tiny, prompts, fresh) < 1e-4


def mismatch(tiny: TinyAudioLLM, prompts: list[Prompt], completions: list[Completion]) -> float:
    """Mean difference of a token's log-prob in the engine and in the policy, nats."""
    differences = []
    for row, one in enumerate(completions):
        logits = training_logits(tiny, prompts, completions, row)
        policy = logits.log_softmax(-1).gather(1, one.token_ids[:, None])[:, 0]
        differences.append((one.log_probs - policy).abs())
    return float(torch.cat(differences).mean())


def test_nothing_is_generated_without_weights_or_after_release(tiny: TinyAudioLLM) -> None:
    prompts = tiny_prompts(tiny)
    rollout = backend(tiny)
    for _ in range(2):
        with pytest.raises(ValueError, match="call update_weights before"):
            generated(rollout, prompts, GREEDY)
        rollout.update_weights(1, ())
        generated(rollout, prompts, GREEDY)
        rollout.release()
        assert not rollout.engine.is_loaded


def test_an_engine_may_stay_loaded(tiny: TinyAudioLLM) -> None:
    rollout = backend(tiny, replace(FEW_ROWS, unload_engine_train=False))
    rollout.update_weights(1, ())
    rollout.release()
    generated(rollout, tiny_prompts(tiny), GREEDY)


def test_a_clip_that_no_table_holds_is_refused(tiny: TinyAudioLLM, prompts: list[Prompt]) -> None:
    rollout = backend(tiny, TrtllmConfig(max_prompt_embedding_table_size=5))
    rollout.update_weights(1, ())
    with pytest.raises(ValueError, match=r"audio tokens, more than rollout.trtllm.max_prompt_embedding_table_size=5"):
        generated(rollout, prompts, GREEDY)


def test_a_policy_with_broken_weights_gives_no_samples() -> None:
    tiny = tiny_audio_llm(qk_layernorm=False)
    rollout = loaded(tiny)
    with torch.no_grad():
        tiny.model.language_model.decoder.final_layernorm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="token 0 of completion 0"):
        generated(rollout, tiny_prompts(tiny), GREEDY)


def trainer_on_the_engine(corpus: Path, run_dir: Path, *overrides: str) -> tuple[MapoTrainer, MegatronRuntime]:
    """A trainer whose rollouts come from the engine; the command itself refuses TensorRT-LLM on this machine."""
    trainer = trainer_of(corpus, run_dir, "model.decoder.qk_layernorm=false", "trainer.mapo.max_steps=2", *overrides)
    policy: AudioLLM = trainer.actor.policy
    engine = MegatronRuntime(
        trainer.config.model, vocab_size=policy.vocab_size, max_batch_size=8, max_prompt_embedding_table_size=64
    )
    config = TrtllmConfig(max_prompt_embedding_table_size=64)
    trainer.actor.rollout = TrtllmRollout(engine, policy, trainer.scorer.tokenizer, config, batch_size=8)
    return trainer, engine


def test_a_run_trains_on_what_the_engine_draws(tmp_path: Path) -> None:
    corpus = write_tiny_corpus(tmp_path / "corpus")
    sampling = ["rollout.sampling.temperature=1.2", "rollout.sampling.top_k=50", "rollout.sampling.top_p=0.99"]
    trainer, engine = trainer_on_the_engine(corpus, tmp_path / "run", *sampling, "objective.behaviour_clip=2")
    start = [parameter.clone() for parameter in trainer.actor.policy.parameters()]
    assert fit(trainer)
    records = metrics(tmp_path / "run")
    assert [record["rollout/staleness"] for record in records] == [0.0, 0.0]
    assert all(record["rollout/log_prob_mismatch"] < 1e-5 for record in records)
    # From noise all tokens are about as likely, so pi / mu is about what top-k and top-p keep of the vocabulary.
    kept = 50 * 0.99 / engine.vocab_size
    assert all(record["train/behaviour_weight"] == pytest.approx(kept, rel=0.4) for record in records)
    assert engine.updates == 2 and not engine.is_loaded
    moved = zip(start, trainer.actor.policy.parameters(), strict=True)
    assert any(not torch.equal(before, after) for before, after in moved)


def test_dynamic_sampling_asks_the_engine_again_before_it_is_unloaded(tmp_path: Path) -> None:
    corpus = write_tiny_corpus(tmp_path / "corpus")
    trainer, engine = trainer_on_the_engine(
        corpus, tmp_path / "run", "trainer.mapo.generation={type: dynamic_sampling, max_generation_rounds: 1}"
    )
    assert fit(trainer)
    assert any(record["rollout/generation_rounds"] > 0 for record in metrics(tmp_path / "run"))
    assert engine.updates == 2 and not engine.is_loaded
