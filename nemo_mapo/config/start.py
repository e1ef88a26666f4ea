"""Checks in milliseconds what a run needs on this machine: a wrong path must not come to light after hours."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from nemo_mapo.config.evaluation import EvaluationConfig
from nemo_mapo.config.explain import nearest
from nemo_mapo.config.input_cfg import Source, located, sources_of
from nemo_mapo.config.load import ConfigError
from nemo_mapo.config.rewards import CustomTerm
from nemo_mapo.config.run import RunConfig

CHECKPOINT_FILE = "trainer_state.json"
"""Present in every complete checkpoint."""
WAYS_OUT = (
    "teach the policy first (python examples/sft.py data=..., then pretrained_checkpoint.restore_from_path="
    "RUN/checkpoints/step_N), or give another checkpoint there"
)


def check_start(config: RunConfig) -> None:
    """Check every path of a run, and what it starts from, without reading data or importing torch.

    Raises:
        ConfigError: naming each key whose file or directory is missing, an unrequested run from random weights, a run
            directory that is in use, or a number of processes other than the config's.
    """
    with _looking():
        problems = [
            *_no_reward(config),
            *_no_start(config),
            *_missing_files(config),
            *_missing_manifests(config),
            *_missing_modules(config),
            *used_directory(config),
            *_processes(config),
            *config.exp_manager.login_problems(),
        ]
    if problems:
        raise ConfigError(*problems)


def check_evaluation_start(config: EvaluationConfig) -> None:
    """ConfigError naming each missing path of an evaluation; completions that already exist need no model."""
    benchmark, checkpoint = config.benchmark, config.pretrained_checkpoint.restore_from_path
    problems = []
    with _looking():
        if not Path(benchmark.items_path).is_file():
            near = _siblings(benchmark.items_path)
            problems.append(f"benchmark.items_path={benchmark.items_path}: no such file{near}")
        if benchmark.audio_root is not None and not Path(benchmark.audio_root).is_dir():
            problems.append(f"benchmark.audio_root={benchmark.audio_root}: no such directory")
        if not Path(config.output_dir).exists():
            problems += [] if checkpoint is None else _checkpoint_problems(checkpoint)
            problems += _tokenizer_problems(config.data.tokenizer)
    if problems:
        raise ConfigError(*problems)


@contextmanager
def _looking() -> Iterator[None]:
    """ConfigError for a path that cannot be checked: no permission, or a name that is too long."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; fix the path, or its permissions") from error


def used_directory(config: RunConfig) -> Iterator[str]:
    """Why a new run cannot be written where the config says."""
    directory = Path(config.exp_manager.explicit_log_dir)
    where = f"exp_manager.explicit_log_dir={directory}"
    existing = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield f"{where}: cannot write there ({existing} is not a writable directory); choose another directory"
        return
    holds_run = (directory / "metrics.jsonl").exists() or any((directory / "checkpoints").glob("step_*"))
    if holds_run and not config.exp_manager.resume_if_exists:
        yield (
            f"{where} already holds a run; choose another directory, "
            "or set exp_manager.resume_if_exists=true to continue it"
        )


def _no_reward(config: RunConfig) -> Iterator[str]:
    """Why nothing would be learned from rollouts."""
    earns = any(term.weight > 0 for term in config.rewards.terms.values()) or config.rewards.tars is not None
    if not config.supervised and not earns:
        yield "rewards.terms: every weight is 0, so all completions earn the same: give one a weight above 0"


def _no_start(config: RunConfig) -> Iterator[str]:
    """Why a run would silently begin with random weights."""
    given = config.warm_start is not None or config.pretrained_checkpoint.restore_from_path is not None
    if given or config.model.from_scratch:
        return
    if config.supervised:
        yield (
            "this run would start from random weights: set pretrained_checkpoint.restore_from_path (made by "
            "examples/import_hf.py or examples/assemble.py from public models), or model.from_scratch=true"
        )
    else:
        yield (
            "this run has neither a warm start nor pretrained_checkpoint.restore_from_path, and random weights earn no "
            f"reward to learn from: {WAYS_OUT}; model.from_scratch=true starts from random weights anyway"
        )


def _missing_files(config: RunConfig) -> Iterator[str]:
    start, encoder, vllm = (
        config.pretrained_checkpoint.restore_from_path,
        config.model.restored_encoder,
        config.rollout.vllm if config.rollout.backend == "vllm" else None,
    )
    if start is not None:
        yield from _checkpoint_problems(start)
    elif config.warm_start is not None and not Path(config.warm_start.cuts_path).is_file():
        yield (
            f"warm_start.cuts_path={config.warm_start.cuts_path}: no such manifest (examples/make_synthetic_corpus.py "
            f"makes that of the embedded run). Or drop it with ~warm_start, and {WAYS_OUT}"
        )
    if encoder is not None and not Path(encoder).is_file():
        yield f"model.perception.restore_from_path={encoder}: no such file{_siblings(encoder)}"
    if vllm is not None and not vllm.urls and shutil.which(vllm.python) is None:
        yield f"rollout.vllm.python={vllm.python}: no such interpreter; `make vllm` builds an environment with vLLM"
    if vllm is not None and vllm.original is not None and not Path(vllm.original).is_dir():
        yield f"rollout.vllm.original={vllm.original}: no such directory{_siblings(vllm.original)}"
    yield from _tokenizer_problems(config.data.tokenizer)


def _checkpoint_problems(given: str) -> Iterator[str]:
    path, key = Path(given), "pretrained_checkpoint.restore_from_path"
    if (path / CHECKPOINT_FILE).is_file():
        return
    if not path.is_dir():
        yield f"{key}={given}: no such directory{_siblings(given)}"
    elif inside := sorted((path / "checkpoints").glob("step_*")) or sorted(path.glob("step_*")):
        yield f"{key}={given}: name one of its checkpoints, e.g. {inside[-1]}"
    else:
        yield f"{key}={given}: not a complete nemo-mapo checkpoint (no {CHECKPOINT_FILE})"


def _tokenizer_problems(given: str) -> Iterator[str]:
    # Without this file transformers guesses a tokenizer from the name of the directory.
    if not (Path(given) / "tokenizer_config.json").is_file():
        yield (
            f"data.tokenizer={given!r}: no tokenizer_config.json there; give a Hugging Face tokenizer's directory "
            "(of an imported model, or of the corpus that examples/make_synthetic_corpus.py makes)"
        )


def _missing_manifests(config: RunConfig) -> Iterator[str]:
    for name, split in config.data.splits.items():
        for number, phase in enumerate(split.in_phases()):
            where = f"data.{name}.phases[{number}]" if split.phases else f"data.{name}"
            for source in sources_of(phase.split.items):
                for path in _single_files(source):
                    if not Path(path).exists():
                        yield f"{where}.{source.where}: no manifest at {path}{_siblings(path)}"


def _missing_modules(config: RunConfig) -> Iterator[str]:
    """Custom rewards whose package is missing; nothing is imported yet."""
    for name, term in config.rewards.computed.items():
        if isinstance(term, CustomTerm) and find_spec(package := term.path.partition(":")[0].partition(".")[0]) is None:
            yield (
                f"rewards.terms.{name}.path={term.path}: no module {package} here: install its package into this "
                "environment, or add its directory to PYTHONPATH"
            )


def _single_files(source: Source) -> Iterator[str]:
    """The manifests of a source that are named one by one; the shards of NeMo's patterns are checked later."""
    paths = (
        [path for path, _, _ in located(source.item)] if source.type in ("nemo", "nemo_tarred") else [source.location]
    )
    yield from (path for path in paths if not any(mark in path for mark in ("_OP_", "{", "(", "[", "<")))


def _processes(config: RunConfig) -> Iterator[str]:
    """Why the number of processes that a launcher started is not the config's."""
    started, asked = int(os.environ.get("WORLD_SIZE", "1")), config.trainer.world_size
    if started != asked:
        yield (
            f"{started} processes were started, but trainer.num_nodes={config.trainer.num_nodes} x "
            f"trainer.devices={config.trainer.devices} asks for {asked}; start them with "
            f"torchrun --nproc-per-node {config.trainer.devices}, or set trainer.devices={started}"
        )


def _siblings(path: str) -> str:
    """A similar name in the same folder, for the end of a message."""
    folder = Path(path).parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = nearest(Path(path).name, names)
    return (
        near
        if near.startswith("; did you mean")
        else ""
        if names
        else f" (nor {folder})"
        if not folder.is_dir()
        else ""
    )
