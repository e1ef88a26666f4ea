"""A tiny checkpoint through the whole evaluation: generation in batches, a restart, scores, the two commands."""

import json

import numpy as np
import pytest
import soundfile
import torch
import yaml

from forked_commands import run as run_command
from nemo_mapo.config.adapters import LoraConfig
from nemo_mapo.config.compose import compose
from nemo_mapo.config.evaluation import EvaluationConfig
from nemo_mapo.config.load import load
from nemo_mapo.config.run import RunConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.evaluation.benchmarks.run import checkpoint_engine, evaluate
from nemo_mapo.models.lora import add_lora, merged_state_dict
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.training.build import build_audio_llm
from nemo_mapo.training.checkpoint import load_checkpoint, write_checkpoint
from nemo_mapo.training.run_directory import recorded_config
from tests.integration.tiny_run import ROOT

pytestmark = pytest.mark.integration

ITEMS = 7
MODEL = [
    "model.decoder.num_layers=2",
    "model.decoder.hidden_size=32",
    "model.decoder.ffn_hidden_size=64",
    "model.decoder.num_attention_heads=4",
    "model.decoder.kv_channels=8",
    "model.perception.channels=16",
    "model.target_layers=[1]",
    "rollout.sampling.max_new_tokens=8",
    "rollout.batch_size=3",
    "statistics.bootstrap_samples=100",
    "num_threads=1",
    "template=none",
]


def evaluation_config(overrides):
    return load(compose(ROOT / "conf" / "evaluate.yaml", overrides), EvaluationConfig)


def random_policy(place):
    config, tokenizer = evaluation_config(overrides(place, "unused")), build_tokenizer()
    return build_audio_llm(
        config.model,
        vocab_size=len(tokenizer),
        special=SpecialTokens.from_tokenizer(tokenizer),
        sample_rate=config.data.sample_rate,
        seed=5,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with clips, a benchmark file in MMAU's layout, a tokenizer and a checkpoint of random weights."""
    path = tmp_path_factory.mktemp("evaluation")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(path / "tokenizer")
    (path / "clips").mkdir()
    records = []
    for number in range(ITEMS):
        noise = np.random.default_rng(number).normal(scale=0.1, size=4000 + 1500 * number)
        soundfile.write(path / "clips" / f"{number}.wav", noise, 16000)
        records.append(
            {
                "id": f"item-{number}",
                "audio_id": f"clips/{number}.wav",
                "question": "what does the tone sound like?" + " and the sweep?" * (number % 3),
                "choices": ["deep", "low", "high", "shrill"],
                "answer": ["deep", "low", "high", "shrill"][number % 4],
                "task": ["sound", "music", "speech"][number % 3],
                "category": "Reasoning",
                "sub-category": "made-up",
                "difficulty": "easy",
            }
        )
    (path / "mmau.json").write_text(json.dumps(records))
    withheld = [{**record, "answer": ""} for record in records]
    (path / "withheld.json").write_text(json.dumps(withheld))
    install_cpu_host()
    initialize_parallel()
    model = random_policy(path)
    write_checkpoint(path / "checkpoint", model)
    return path


def overrides(place, name, *more):
    return [
        "benchmark=mmau",
        f"benchmark.items_path={place / 'mmau.json'}",
        f"output_dir={place / name}",
        f"data.tokenizer={place / 'tokenizer'}",
        f"pretrained_checkpoint.restore_from_path={place / 'checkpoint'}",
        *MODEL,
        *more,
    ]


def evaluated(place, name, *more, engine=checkpoint_engine):
    return evaluate(evaluation_config(overrides(place, name, *more)), engine)


def predictions(directory):
    return [json.loads(line) for line in (directory / "predictions.jsonl").read_text().splitlines()]


def no_engine(config, audio_root):
    raise AssertionError("there is nothing to generate")


@pytest.fixture(scope="module")
def uninterrupted(place):
    return evaluated(place, "whole")


def test_every_item_gets_a_prediction_and_the_denominator_is_the_whole_set(uninterrupted):
    found = predictions(uninterrupted)
    assert [record["id"] for record in found] == [f"item-{number}" for number in range(ITEMS)]
    assert all(record["completion"] and record["shown_choices"] for record in found)
    results = json.loads((uninterrupted / "results.json").read_text())
    assert results["overall"]["items"] == ITEMS and results["overall"]["missing"] == 0
    assert "| sound | 3 |" in (uninterrupted / "results.md").read_text()


def test_an_interrupted_evaluation_resumes_to_the_same_result(place, uninterrupted):
    cut = evaluated(place, "cut")
    lines = (cut / "predictions.jsonl").read_text().splitlines(keepends=True)
    (cut / "predictions.jsonl").write_text("".join(lines[:4]) + lines[4][: len(lines[4]) // 2])
    evaluated(place, "cut")
    for name in ("predictions.jsonl", "results.json"):
        assert (cut / name).read_text() == (uninterrupted / name).read_text()


def test_a_finished_evaluation_is_scored_again_without_the_model(place, uninterrupted):
    before = (uninterrupted / "results.json").read_text()
    evaluated(place, "whole", engine=no_engine)
    assert (uninterrupted / "results.json").read_text() == before


def test_the_batch_size_does_not_change_the_answers(place, uninterrupted):
    assert predictions(evaluated(place, "batches", "rollout.batch_size=2")) == predictions(uninterrupted)


def test_a_checkpoint_with_adapters_is_evaluated_with_them(place, tmp_path):
    adapted, checkpoint = random_policy(place), tmp_path / "checkpoints" / "step_000001"
    add_lora(adapted.language_model, LoraConfig(rank=2, alpha=6.0), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    checkpoint.parent.mkdir()
    write_checkpoint(checkpoint, adapted)
    run = load(compose(ROOT / "conf" / "train_mapo.yaml", ["model.lora={rank: 2, alpha: 6}"]), RunConfig)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded_config(run)))
    asked = f"pretrained_checkpoint.restore_from_path={checkpoint}"
    engine = checkpoint_engine(evaluation_config(overrides(place, "adapted", asked)), place)
    evaluated, wanted = engine.backend.model.language_model.state_dict(), merged_state_dict(adapted.language_model)
    for name, value in random_policy(place).language_model.named_parameters():
        torch.testing.assert_close(evaluated[name], wanted[name], msg=name)
        assert torch.equal(evaluated[name], value) != ("linear_" in name and name.endswith(".weight"))
    with pytest.raises(ValueError, match="holds LoRA adapters, which the model"):
        load_checkpoint(checkpoint, random_policy(place))


def test_shuffled_choices_are_shown_and_noted(place, uninterrupted):
    directory = evaluated(place, "shuffled", "shuffle_choices=7")
    shown = [tuple(record["shown_choices"]) for record in predictions(directory)]
    assert len(set(shown)) > 1 and {tuple(sorted(order)) for order in shown} == {("deep", "high", "low", "shrill")}
    assert "shuffled with seed 7" in (directory / "results.md").read_text()


def test_withheld_answers_end_in_a_file_to_submit(place):
    directory = evaluated(place, "withheld", f"benchmark.items_path={place / 'withheld.json'}")
    submitted = json.loads((directory / "submission.json").read_text())
    assert [record["id"] for record in submitted] == [f"item-{number}" for number in range(ITEMS)]
    assert all(isinstance(record["model_output"], str) for record in submitted)
    assert not (directory / "results.json").exists()


def test_another_config_does_not_touch_the_predictions_that_are_there(place, uninterrupted):
    before = (uninterrupted / "predictions.jsonl").read_text()
    with pytest.raises(ValueError, match=r"rollout\.sampling\.temperature: 0\.0 then, 1\.0 now"):
        evaluated(place, "whole", "rollout.sampling.temperature=1.0", engine=no_engine)
    assert (uninterrupted / "predictions.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pretrained_checkpoint.restore_from_path=null", "restore_from_path is not set"),
        ("model.tensor_model_parallel_size=2", "tensor_model_parallel_size=2: evaluation runs in one process"),
        ("rollout.sampling.max_new_tokens=500", "the prompt of item item-0 has"),
        ("benchmark.audio_root=nowhere", "item item-0: audio nowhere/clips/0.wav cannot be read"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_generation(place, tmp_path, override, said):
    with pytest.raises(ValueError, match=said):
        evaluated(place, "refused", override, f"output_dir={tmp_path / 'refused'}")
    assert not (tmp_path / "refused" / "predictions.jsonl").exists()


def counts(results):
    """What does not depend on how intervals were drawn."""
    rows = [results["overall"], *(row for table in results["tables"] for row in table["rows"])]
    return [[row[name] for name in ("group", "items", "score", "missing", "unparsable")] for row in rows]


def test_the_commands_evaluate_and_score_to_the_same_table(place, uninterrupted):
    finished = run_command("evaluate.py", *overrides(place, "command"))
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert (place / "command" / "predictions.jsonl").read_text() == (uninterrupted / "predictions.jsonl").read_text()
    rescored = run_command(
        "score_predictions.py", "mmau", "--items", place / "mmau.json", "--field", "completion",
        "--predictions", place / "command" / "predictions.jsonl", "--compare", uninterrupted / "predictions.jsonl",
        "--output", place / "rescored",
    )  # fmt: skip
    assert rescored.returncode == 0, rescored.stderr[-2000:]
    first, second = (json.loads((place / name / "results.json").read_text()) for name in ("command", "rescored"))
    assert counts(first) == counts(second)
    assert "exact McNemar p = 1.0000" in rescored.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("evaluate.py", ["benchmark.items_path=nowhere.json"], "benchmark.items_path=nowhere.json: no such file"),
        ("evaluate.py", ["template=xml"], "template='xml'"),
        ("score_predictions.py", ["mmau", "--items", "nowhere.json", "--predictions", "x.json"], "error: no file at"),
    ],
)
def test_an_error_is_one_message_and_a_failing_status(script, arguments, said):
    finished = run_command(script, *arguments)
    assert finished.returncode != 0
    assert said in finished.stdout + finished.stderr
    assert "Traceback" not in finished.stdout + finished.stderr
