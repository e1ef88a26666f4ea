"""What is written is whole or not there, whatever ends the writing."""

import fcntl
import os

import pytest

from nemo_mapo.files import UNFINISHED, whole_directory, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_the_one_before_it_in_one_step(tmp_path):
    path = write_text(tmp_path / "new" / "page.html", "first")
    assert write_text(path, "zwölf").read_text(encoding="utf-8") == "zwölf"
    assert names(path.parent) == ["page.html"]


def test_a_directory_has_its_name_only_when_it_is_filled(tmp_path):
    with whole_directory(tmp_path / "made") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "made").exists()
    assert names(tmp_path) == ["made"] and names(tmp_path / "made") == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_nothing(tmp_path, error):
    with pytest.raises(error), whole_directory(tmp_path / "made") as folder:
        (folder / "file").write_text("x")
        raise error
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_replaced(tmp_path):
    left = tmp_path / f"made{UNFINISHED}"
    (left / "inside").mkdir(parents=True)
    (left / "file").write_text("half")
    with whole_directory(tmp_path / "made") as folder:
        (folder / "other").write_text("x")
    assert names(tmp_path / "made") == ["other"]


def test_a_directory_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "made").mkdir()
    with pytest.raises(ValueError, match="already exists"), whole_directory(tmp_path / "made"):
        pass
    with pytest.raises(ValueError, match="cannot write there"), whole_directory(write_text(tmp_path / "a", "") / "b"):
        pass


def test_two_processes_do_not_fill_one_directory(tmp_path):
    (left := tmp_path / f"made{UNFINISHED}").mkdir()
    (left / "theirs").write_text("x")
    held = os.open(left, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is writing it"), whole_directory(tmp_path / "made"):
        pass
    os.close(held)
    assert names(left) == ["theirs"]
