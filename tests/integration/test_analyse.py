"""A tiny run through the analysis commands: batches, layouts, other questions, refusals, pages without the model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from forked_commands import run
from nemo_mapo.config.analysis import AnalysisConfig
from nemo_mapo.config.compose import compose
from nemo_mapo.config.load import as_plain, load
from nemo_mapo.config.run import RunConfig
from nemo_mapo.data.tokenizer import load_tokenizer
from nemo_mapo.embedded.warm_start import start_embedded
from nemo_mapo.evaluation.grounding.measure import measure_run
from nemo_mapo.evaluation.grounding.run import analyse_run
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.training.checkpoint import write_checkpoint
from nemo_mapo.training.policies import build_policy
from tests.integration.tiny_run import ROOT, command, write_tiny_corpus

pytestmark = pytest.mark.integration

CONFIG = {"samples_per_item": 2, "bootstrap_samples": 50, "ratios": (0.3,)}
LAYOUT = {
    "model": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "trainer": {"devices": 2},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "synthetic")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """What the analysis reads of a run directory: the config, and a checkpoint away from the start."""
    install_cpu_host()
    initialize_parallel()
    run = tmp_path_factory.mktemp("runs") / "trained"
    config = load(compose(ROOT / "conf" / "train_mapo.yaml", command(corpus, run)[2:]), RunConfig)
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(as_plain(config)))
    policy = build_policy(config, load_tokenizer(config.data.tokenizer))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    write_checkpoint(run / "checkpoints" / "step_000002", policy)
    return run


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the run whose config differs in the given sections."""

    def copy(name, **sections):
        run = tmp_path / name
        shutil.copytree(trained, run, ignore=shutil.ignore_patterns("analysis"))
        config = yaml.safe_load((run / "config.yaml").read_text())
        for section, changes in sections.items():
            config[section] |= changes
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        return run

    return copy


def analysis(run, *, checkpoint=None, cuts=None, **changes):
    """What analysis.json holds, without the run's name."""
    config = AnalysisConfig(**CONFIG | changes)
    page = analyse_run(run, checkpoint, split="test", cuts=cuts, config=config, warm_starter=start_embedded)
    found = json.loads(page.with_suffix(".json").read_text())
    del found["run"]
    return found


def test_the_analysis_of_a_checkpoint_is_a_function_of_it(trained):
    assert analysis(trained) == analysis(trained)


def test_a_question_left_over_at_the_end_is_analysed_with_the_batch_before_it(trained):
    whole, cut = analysis(trained), analysis(trained, batch_size=3)
    del whole["settings"], cut["settings"]
    assert len(cut["ids"]) == 4 and cut == whole


def test_fewer_questions_are_drawn_at_random_and_counted(trained):
    ids = analysis(trained)["ids"]
    drawn = {seed: analysis(trained, max_items=2, seed=seed) for seed in range(4)}
    assert all(len(found["ids"]) == 2 and found["items_in_split"] == len(ids) == 4 for found in drawn.values())
    assert all([name for name in ids if name in found["ids"]] == found["ids"] for found in drawn.values())
    assert len({tuple(found["ids"]) for found in drawn.values()}) > 1


def test_a_run_of_several_ranks_is_analysed_in_one_process(copy, trained):
    start = {"pretrained_checkpoint": {"restore_from_path": str(trained / "checkpoints" / "step_000002")}}
    assert analysis(copy("cut", **LAYOUT, **start)) == analysis(copy("whole", **start))


def test_a_start_drawn_on_several_ranks_is_refused(copy):
    with pytest.raises(ValueError, match="started from weights drawn on several ranks"):
        analysis(copy("cut", **LAYOUT))


def test_attention_that_keeps_its_weights_is_refused(copy):
    other = {"model": {"attention_backend": "transformer_engine", "shared_prompts": False},
             "trainer": {"accelerator": "gpu", "precision": "bf16"}}  # fmt: skip
    with pytest.raises(ValueError, match=r"attention_backend=transformer_engine.*sdpa only"):
        analysis(copy("fused", **other))


def test_the_questions_may_be_those_of_another_manifest(trained, corpus):
    cuts = corpus / "cuts_validation.jsonl.gz"
    found, own = analysis(trained, cuts=cuts), analysis(trained)
    assert found["split"] == "cuts_validation" and not set(found["ids"]) & set(own["ids"])


def test_a_checkpoint_that_is_not_there_is_refused(trained):
    with pytest.raises(ValueError, match="step_000099 is not a complete nemo-mapo checkpoint"):
        analysis(trained, checkpoint="step_000099")


def test_pages_are_made_from_the_files_alone(copy, tmp_path):
    runs = [copy(name) for name in ("first", "second")]
    for analysed in runs:
        analysis(analysed)
        shutil.rmtree(analysed / "checkpoints")
    finished = run("compare.py", *runs, "--output", tmp_path / "page.html")
    assert finished.returncode == 0, finished.stderr[-3000:]
    page = Path(tmp_path / "page.html").read_text()
    assert "first: checkpoint step_000002, test" in page and "second: checkpoint step_000002, test" in page


def test_analyses_of_other_questions_are_not_compared(copy, corpus, tmp_path):
    runs = [copy(name) for name in ("first", "second")]
    analysis(runs[0])
    analysis(runs[1], cuts=corpus / "cuts_validation.jsonl.gz")
    finished = run("compare.py", *runs, "--output", tmp_path / "page.html")
    assert finished.returncode != 0 and "0 of them are shared" in finished.stderr
    assert "Traceback" not in finished.stderr and not (tmp_path / "page.html").exists()


def test_the_measurements_of_a_checkpoint_are_question_by_question(trained):
    config = AnalysisConfig(**CONFIG)
    path = measure_run(trained, None, split="test", config=config, warm_starter=start_embedded)
    found = json.loads(path.read_text())
    assert path.name == "step_000002-test.json" and path.parent.name == "evidence"
    assert {"full", "silence", "exchanged", "deaf_late", "only_late"} <= found["correct"].keys()
    for scores in (*found["correct"].values(), *found["truth"].values(), found["tokens"], found["late_mass"]):
        assert len(scores) == len(found["ids"]) == 4
    assert found["usual"] == [None] * 4
