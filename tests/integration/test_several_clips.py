"""Questions about two clips, through the commands: training with mixed rows, and its checkpoint's rollouts."""

from dataclasses import replace
from pathlib import Path

import pytest
from lhotse import CutSet

from nemo_mapo.data.manifests import load_cuts
from nemo_mapo.models.layout import PADDED_ROWS
from nemo_mapo.rows import training_rows
from support.tiny import tiny_audio_llm, tiny_groups
from tests.integration.tiny_run import metrics, train, write_tiny_corpus

pytestmark = pytest.mark.integration


def test_a_run_trains_on_one_and_two_clips(tmp_path: Path) -> None:
    corpus = write_tiny_corpus(tmp_path / "synthetic")
    path = corpus / "cuts_train.jsonl.gz"
    cuts = list(load_cuts(path))
    for number, cut in enumerate(cuts):
        if number % 2:
            cut.custom["audio_2"] = cuts[number - 1].recording
    CutSet.from_cuts(cuts).to_file(path)
    run_dir = tmp_path / "run"
    finished = train(
        corpus,
        run_dir,
        *(
            "trainer.mapo.max_steps=2",
            "trainer.mapo.generation={type: dynamic_sampling, max_generation_rounds: 2}",
            "data.test_ds=null",
        ),
        *("model.lora={rank: 2}", "model.freeze={perception: false, projector: false}"),
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    steps = metrics(run_dir)[1:]
    assert len(steps) == 2 and all(record["rollout/log_prob_gap"] < 1e-3 for record in steps)
    assert all(record["mapo/audio_mass"] > 0 for record in steps)


def test_rows_bring_their_own_clips() -> None:
    tiny = tiny_audio_llm()
    first, second = tiny_groups(tiny)
    both = replace(first, prompt=replace(first.prompt, clips=(*first.prompt.clips, *second.prompt.clips)))
    rows = training_rows([both, second])
    inputs = PADDED_ROWS.lay_out(rows, tiny.model)
    assert inputs.audio_row.tolist() == [[0, 1]] * len(both) + [[1, -1]] * len(second)
    last = PADDED_ROWS.lay_out(rows[3:], tiny.model)
    assert last.audio_row.tolist() == [0] and last.audio.lengths.tolist() == [len(second.prompt.clips[0])]
