"""The table of rollouts: the first prompt's group, in W&B and, readable, in TensorBoard."""

import html
import json

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_mapo.aligner import CustomLoggerWrapper
from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.rewards.combined import RewardTable
from nemo_mapo.rows import ScoredRow, TokenSignals, training_rows
from nemo_mapo.training.records import JsonLines, JsonLinesLogger
from nemo_mapo.training.samples import TABLE, SampleWriter
from nemo_mapo.training.scoring import ScoredRollouts
from support.tiny import tiny_audio_llm, tiny_groups, with_texts

TEXTS = ("<think> a | b\nso </think> deep", "<b>low</b>", "third", "fourth")
PLAIN = ObjectiveConfig(mask="none", eta=0.0, log_grounding=False)


@pytest.fixture
def writer(tmp_path):
    """A writer that has seen step 7: two prompts with two completions each."""
    tiny = tiny_audio_llm()
    groups = with_texts(tiny_groups(tiny), TEXTS)
    rows = [
        ScoredRow(
            prompt=row.prompt,
            token_ids=row.token_ids,
            old_log_probs=torch.zeros(len(row.token_ids)),
            ref_log_probs=torch.zeros(len(row.token_ids)),
            text_ref_entropy_nats=None,
            pos_gate=torch.ones(len(row.token_ids), dtype=torch.bool),
            advantages=torch.tensor(advantage),
            accuracy_rewards=torch.tensor(1.0),
            finished=torch.tensor(True),
        )
        for row, advantage in zip(training_rows(groups), (0.5, -0.5, 0.25, -0.25), strict=True)
    ]
    rewards = RewardTable(
        by_reward={"accuracy": [1.0, 0.0, 0.0, 0.0], "consistency": [None, 1.0, 1.0, 1.0]}, total=[4.0, 1.0, 1.0, 1.0]
    )
    signals = {
        number: TokenSignals(log_probs=row.ref_log_probs, entropy_nats=row.ref_log_probs)
        for number, row in enumerate(rows)
    }
    writer = SampleWriter(
        JsonLines(tmp_path / "rollouts.jsonl"), tiny.tokenizer, PLAIN, keep_clip=lambda step, prompt: None
    )
    writer.write_training(7, groups[0], ScoredRollouts(rows=rows, rewards=rewards, signals=signals, metrics={}))
    return writer


def test_tensorboard_shows_the_group_of_the_first_prompt_with_its_tags(writer, tmp_path):
    board = TensorBoardLogger(tmp_path / "board")
    writer.log_table(CustomLoggerWrapper([JsonLinesLogger(JsonLines(tmp_path / "metrics.jsonl")), board]), step=7)
    board.finalize("success")
    events = EventAccumulator(board.log_dir)
    events.Reload()
    (event,) = events.Tensors(f"{TABLE}/text_summary")
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    assert event.step == 7 and len(lines) == 2 + 2
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    columns, first = cells[0], cells[2]
    shown = dict(zip(columns, first, strict=True))
    assert "<think>" not in shown["text"]
    assert html.unescape(shown["text"]).replace("<br>", "\n") == TEXTS[0]
    assert (shown["reward_total"], shown["reward_consistency"], shown["advantage"]) == ("4.0", "None", "0.5")


def test_wandb_gets_the_same_rows_as_a_table(writer, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    writer.log_table(CustomLoggerWrapper([wandb]), step=7)
    wandb.experiment.finish()
    (file,) = tmp_path.rglob("*.table.json")
    table = json.loads(file.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["text"] for row in rows] == list(TEXTS[:2])
    assert [(row["step"], row["reward_total"], row["advantage"]) for row in rows] == [(7, 4.0, 0.5), (7, 1.0, -0.5)]
