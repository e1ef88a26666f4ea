"""Checkpoints come back bit for bit, and a half-written one is never picked up."""

import multiprocessing
import resource
import shutil

import pytest
import torch

from nemo_mapo.config.exp_manager import CheckpointCallbackConfig
from nemo_mapo.config.model import OptimizerConfig
from nemo_mapo.training.checkpoint import CheckpointStore, load_checkpoint, write_checkpoint
from nemo_mapo.training.finished_run import find_checkpoint
from nemo_mapo.training.optimizer import build_optimizer, wrap_data_parallel
from nemo_mapo.training.prompts import check_counts
from nemo_mapo.training.room import NoRoomLeft, no_room_in
from support.tiny import tiny_audio_llm, tiny_batch

OPTIM = OptimizerConfig(lr=1e-2, weight_decay=0.1)


def stepped(seed, steps):
    tiny = tiny_audio_llm(seed=seed)
    optimizer = build_optimizer(wrap_data_parallel(tiny.model), OPTIM)
    prompts = tiny_batch(tiny)
    for _ in range(steps):
        optimizer.zero_grad()
        tiny.model(prompts.tokens, prompts.audio, prompts.audio_row).logits.square().mean().backward()
        optimizer.step(lr=1e-2, max_norm=1.0)
    return tiny, optimizer


def assert_same_state(left, left_optimizer, right, right_optimizer):
    for name, value in left.model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, right.model.state_dict()[name]), name
    pairs = zip(left.model.parameters(), right.model.parameters(), strict=True)
    for parameter, other in pairs:
        for key, value in left_optimizer.adamw.state[parameter].items():
            assert torch.equal(value, right_optimizer.adamw.state[other][key]), key


def test_weights_and_optimizer_come_back_bit_for_bit(tmp_path):
    tiny, optimizer = stepped(seed=0, steps=4)
    store = CheckpointStore(tmp_path, keep=2)
    store.save(4, tiny.model, optimizer, {"step": 4})
    other, other_optimizer = stepped(seed=1, steps=0)
    state = load_checkpoint(store.latest().path, other.model, optimizer=other_optimizer)
    assert state == {"step": 4}
    assert_same_state(tiny, optimizer, other, other_optimizer)


def test_no_process_stays_behind_a_saved_checkpoint(tmp_path):
    write_checkpoint(tmp_path / "step_000001", tiny_audio_llm().model)
    assert not multiprocessing.active_children()


def test_only_the_newest_are_kept_and_unfinished_ones_are_ignored(tmp_path):
    tiny, optimizer = stepped(seed=0, steps=1)
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(step, tiny.model, optimizer, {"step": step})
    (tmp_path / "step_000004.unfinished").mkdir()
    assert store.latest().state == {"step": 3}
    assert sorted(path.name for path in tmp_path.glob("step_??????")) == ["step_000002", "step_000003"]


def names(directory):
    return sorted(path.name for path in directory.glob("step_*"))


def test_the_best_is_kept_beside_the_newest_and_has_a_link(tmp_path):
    tiny, optimizer = stepped(seed=0, steps=1)
    folder = tmp_path / "checkpoints"
    store = CheckpointStore(folder, keep=1)

    def save(step, validation=None):
        store.save(step, tiny.model, optimizer, {"step": step}, validation)

    for step, accuracy in enumerate((0.5, 0.75, 0.75, 0.25), start=1):
        save(step, {"val/accuracy": accuracy, "val/loss": accuracy})
    assert names(folder) == ["step_000002", "step_000004"]
    assert store.facts() == {"best_checkpoint": {"name": "step_000002", "metric": "val/accuracy", "value": 0.75}}
    assert load_checkpoint(folder / "best", tiny.model)["step"] == 2
    assert find_checkpoint(tmp_path, "best") == folder / "step_000002"
    # The next session, and a checkpoint that no validation preceded.
    store = CheckpointStore(folder, keep=1)
    save(5)
    assert names(folder) == ["step_000002", "step_000005"]
    save(6, {"val/accuracy": 0.8})
    assert names(folder) == ["step_000006"] and (folder / "best").readlink().name == "step_000006"


def test_a_run_copied_without_its_links_goes_on(tmp_path):
    tiny, optimizer = stepped(seed=0, steps=1)
    CheckpointStore(tmp_path / "run", keep=2).save(1, tiny.model, optimizer, {"step": 1}, {"val/accuracy": 0.5})
    copied = shutil.copytree(tmp_path / "run", tmp_path / "copied")
    assert (copied / "best").is_dir() and not (copied / "best").is_symlink()
    CheckpointStore(copied, keep=2).save(2, tiny.model, optimizer, {"step": 2}, {"val/accuracy": 0.75})
    assert (copied / "best").readlink().name == "step_000002" and names(copied) == ["step_000001", "step_000002"]


def test_what_is_the_best_is_said_in_lightnings_words(tmp_path):
    tiny, optimizer = stepped(seed=0, steps=1)
    best = CheckpointCallbackConfig(monitor="val/reward", mode="min", save_top_k=2)
    store = CheckpointStore(tmp_path, keep=1, best=best)
    for step, reward in enumerate((3.0, 1.0, 2.0, 4.0), start=1):
        store.save(step, tiny.model, optimizer, {"step": step}, {"val/accuracy": 1 / step, "val/reward": reward})
    assert names(tmp_path) == ["step_000002", "step_000003", "step_000004"]
    assert (tmp_path / "best").readlink().name == "step_000002"
    assert CheckpointCallbackConfig().score({"val/loss": 2.0}) == ("val/loss", -2.0)
    with pytest.raises(ValueError, match=r"monitor=val/acuracy: .*; did you mean val/accuracy\?"):
        CheckpointCallbackConfig(monitor="val/acuracy").score({"val/accuracy": 0.5, "val/loss": 2.0})
    newest = CheckpointStore(tmp_path / "newest", keep=1, best=CheckpointCallbackConfig(save_top_k=0))
    for step in (1, 2):
        newest.save(step, tiny.model, optimizer, {"step": step}, {"val/accuracy": 1 / step})
    assert names(tmp_path / "newest") == ["step_000002"] and newest.facts() == {}


def test_a_damaged_state_is_not_the_best_and_stops_no_run(tmp_path):
    tiny, optimizer = stepped(seed=0, steps=1)
    store = CheckpointStore(tmp_path, keep=3)
    store.save(1, tiny.model, optimizer, {"step": 1}, {"val/accuracy": 0.9})
    (tmp_path / "step_000001" / "trainer_state.json").write_text("{")
    store.save(2, tiny.model, optimizer, {"step": 2}, {"val/accuracy": 0.1})
    assert (tmp_path / "best").readlink().name == "step_000002"


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a complete nemo-mapo checkpoint"):
        load_checkpoint(tmp_path, tiny_audio_llm().model)


FILES = ("__0_0.distcp", ".metadata", "common.pt", "metadata.json", "trainer_state.json")


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A store with the checkpoints of steps 1 and 2; tests repair what they break."""
    tiny, optimizer = stepped(seed=0, steps=1)
    store = CheckpointStore(tmp_path_factory.mktemp("run"), keep=2)
    for step in (1, 2):
        store.save(step, tiny.model, optimizer, {"step": step})
    # Newer Megatron-core writes a process's tensors into one file, older ones into two.
    assert {path.name for path in store.latest().path.iterdir()} - {"__0_1.distcp"} == {*FILES, "checksums.json"}
    return store


@pytest.fixture
def flipped(two_steps, request):
    """The newest checkpoint with one bit of the file `request.param` turned over."""
    file = two_steps.directory / "step_000002" / request.param
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    yield file
    file.write_bytes(whole)


@pytest.mark.parametrize("flipped", FILES, indirect=True)
def test_one_flipped_bit_is_found_and_the_checkpoint_before_it_taken(two_steps, flipped):
    with pytest.raises(ValueError, match=rf"{flipped.name}.* the checkpoint is damaged"):
        load_checkpoint(flipped.parent, tiny_audio_llm().model)
    found, damaged = two_steps.newest_undamaged()
    assert found.path.name == "step_000001"
    assert len(damaged) == 1 and flipped.name in damaged[0]


@pytest.mark.parametrize(("change", "said"), [(lambda whole: whole[:-1], "bytes, but"), (None, "missing")])
def test_a_shorter_or_missing_file_is_found(two_steps, change, said):
    file = two_steps.directory / "step_000002" / "__0_0.distcp"
    whole = file.read_bytes()
    file.unlink()
    if change is not None:
        file.write_bytes(change(whole))
    with pytest.raises(ValueError, match=rf"__0_0\.distcp.* {said}"):
        load_checkpoint(file.parent, tiny_audio_llm().model)
    file.write_bytes(whole)


def test_a_run_with_damaged_checkpoints_only_is_refused(two_steps):
    wholes = {path: path.read_bytes() for path in two_steps.directory.glob("step_*/common.pt")}
    for path in wholes:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole.*step_000002/common\.pt has 0 bytes"):
        two_steps.newest_undamaged()
    for path, whole in wholes.items():
        path.write_bytes(whole)


def test_a_checkpoint_without_checksums_is_read_with_a_warning(tmp_path, caplog):
    tiny = tiny_audio_llm()
    write_checkpoint(tmp_path / "step_000001", tiny.model, state={"step": 1})
    (tmp_path / "step_000001" / "checksums.json").unlink()
    assert load_checkpoint(tmp_path / "step_000001", tiny_audio_llm(seed=1).model) == {"step": 1}
    assert "has no checksums.json" in caplog.text


@pytest.mark.parametrize("value", [-1, 1.5, True, "4", None])
def test_a_state_that_is_no_count_is_refused(value):
    with pytest.raises(ValueError, match="step must be a whole number of at least 0"):
        check_counts({"epoch": 0, "step": value}, ("epoch", "step"))


@pytest.fixture
def small_files():
    """No file may grow beyond this, which for the writer is a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoints_before(two_steps, small_files):
    tiny, optimizer = stepped(seed=0, steps=1)
    with pytest.raises(
        NoRoomLeft, match=r"run.*: (No space left|a file could not be written).*\. Earlier checkpoints are untouched"
    ):
        two_steps.save(3, tiny.model, optimizer, {"step": 3})
    assert sorted(path.name for path in two_steps.directory.iterdir()) == ["step_000001", "step_000002"]
    assert two_steps.newest_undamaged()[0].state == {"step": 2}


def test_a_full_disk_is_said_of_records_too_and_other_errors_stay(tmp_path, small_files):
    with pytest.raises(NoRoomLeft, match="File too large"), no_room_in(tmp_path):
        (tmp_path / "metrics.jsonl").write_bytes(bytes(32 << 10))
    with pytest.raises(FileNotFoundError), no_room_in(tmp_path):
        (tmp_path / "absent").read_text()
