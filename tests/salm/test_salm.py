"""NeMo's SALM in and out, against NeMo's own class, which runs in an environment of its own (docs/models.md).

`NEMO_SALM=DIR`, a directory that comes first on the path and holds NeMo 2.5 with its speechlm2, switches it on.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch
from integration.parts_tiny import load_policy, save_chat_model
from integration.qwen_omni_tiny import prompts_of, tensors_of
from safetensors.torch import load_file
from torch import Tensor

from forked_commands import checked as run
from forked_commands import environment
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.data.prompts import encode_prompt
from nemo_mapo.data.tokenizer import SALM_AUDIO, load_tokenizer
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.training.salm import export_salm, import_salm
from nemo_mapo.types import Example, Wording
from tests.integration.tiny_run import metrics, write_tiny_corpus

NEMO = os.environ.get("NEMO_SALM")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(NEMO is None, reason="NEMO_SALM is not set: no NeMo with a SALM class (docs/models.md)"),
]

NEW_TOKENS = 8
QUESTIONS = ("is it low or high?", "what is to be heard?")
CLIPS = [torch.randn(n, generator=torch.Generator().manual_seed(n)) * 0.1 for n in (16000, 23456)]


@dataclass(frozen=True)
class Made:
    llm: Path
    salm: Path
    policy: Path


def nemo(*arguments: object) -> None:
    """Run tests/salm/nemo_salm.py with NeMo's class."""
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "nemo_salm.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**environment(), "PYTHONPATH": str(NEMO)},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory):
    install_cpu_host()
    initialize_parallel()
    folder = tmp_path_factory.mktemp("salm")
    save_chat_model(folder / "llm")

    @cache
    def made(kind: Literal["plain", "lora"]) -> Made:
        nemo("make", folder / "llm", folder / kind, kind)
        import_salm(folder / kind, folder / "llm", folder / f"{kind}-policy")
        return Made(folder / "llm", folder / kind, folder / f"{kind}-policy")

    return made


def our_answers(policy: Path, checkpoint: Path) -> list[list[int]]:
    """Greedy tokens of the imported policy."""
    tokenizer, model = load_tokenizer(policy / "tokenizer"), load_policy(policy, checkpoint)
    rows = [
        (encode_prompt(example(text), model.num_audio_tokens(len(clip)), tokenizer, Wording()), [clip])
        for text, clip in zip(QUESTIONS, CLIPS, strict=True)
    ]
    generated = MegatronRollout(model, tokenizer, batch_size=4).generate(
        prompts_of(rows),
        SamplingConfig(temperature=0.0, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS),
        group_size=1,
        seeds=torch.arange(len(rows)),
    )
    return [one.token_ids.tolist() for (one,) in generated]


def nemos_answers(salm: Path, policy: Path, folder: Path) -> list[list[int]]:
    """Greedy tokens of NeMo's class, which may not say special tokens, as our policies never do."""
    tokenizer = load_tokenizer(policy / "tokenizer")
    rows: list[tuple[Tensor, Tensor]] = []
    for text, clip in zip(QUESTIONS, CLIPS, strict=True):
        ids = torch.tensor(encode_prompt(example(text), 1, tokenizer, Wording()))
        assert int((ids == tokenizer.convert_tokens_to_ids(SALM_AUDIO)).sum()) == 1
        rows.append((ids, clip))
    vocabulary = len(load_file(salm / "model.safetensors")["embed_tokens.weight"])
    special = {token for token in tokenizer.added_tokens_decoder if token in tokenizer.all_special_ids}
    beyond = range(len(load_tokenizer(policy / "original" / "llm")), vocabulary)
    suppress = sorted(token for token in {*special, *beyond} if token < vocabulary)
    torch.save({"rows": rows, "new_tokens": NEW_TOKENS, "suppress": suppress}, folder / "in.pt")
    nemo("generate", salm, folder / "in.pt", folder / "out.pt")
    found: list[list[int]] = torch.load(folder / "out.pt")
    return found


def example(text: str) -> Example:
    return Example(id="1", question=text, choices=("low", "high"), answer="low", task="t")


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_an_imported_salm_answers_as_nemos_class_and_goes_back(make, kind, tmp_path) -> None:
    made = make(kind)
    answers = our_answers(made.policy, made.policy / "checkpoint")
    assert len({token for answer in answers for token in answer}) > 3
    assert nemos_answers(made.salm, made.policy, tmp_path) == answers
    export_salm(made.policy / "checkpoint", made.policy / "original", tmp_path / "exported")
    assert nemos_answers(tmp_path / "exported", made.policy, tmp_path) == answers
    if kind == "plain":
        before, after = tensors_of(made.salm), tensors_of(tmp_path / "exported")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_salm_is_trained_and_nemos_class_answers_as_the_trained_policy(make, tmp_path) -> None:
    made, run_dir = make("plain"), tmp_path / "run"
    corpus = write_tiny_corpus(tmp_path / "synthetic")
    run(
        "train_mapo.py",
        *("--config-dir", str(made.policy / "conf"), "model=imported", "~warm_start"),
        f"data.tokenizer={made.policy}/tokenizer",
        f"pretrained_checkpoint.restore_from_path={made.policy}/checkpoint",
        f"data.corpus_dir={corpus}",
        f"exp_manager.explicit_log_dir={run_dir}",
        *("trainer.num_threads=1", "trainer.mapo.max_steps=2", "trainer.mapo.val_check_interval=2"),
        *("trainer.mapo.save_interval=2", "trainer.mapo.num_rollouts_per_prompt=2", "data.train_ds.batch_size=4"),
        *("model.global_batch_size=4", "model.micro_batch_size=4", "rollout.sampling.max_new_tokens=8"),
        *("model.optim.lr=1e-2", "data.test_ds=null"),
    )
    assert all(record["rollout/log_prob_gap"] < 1e-3 for record in metrics(run_dir)[1:])
    checkpoint = run_dir / "checkpoints" / "step_000002"
    answers = our_answers(made.policy, checkpoint)
    assert answers != our_answers(made.policy, made.policy / "checkpoint")
    export_salm(checkpoint, made.policy / "original", tmp_path / "exported")
    assert nemos_answers(tmp_path / "exported", made.policy, tmp_path) == answers
