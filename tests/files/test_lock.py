"""The lock of a target: what else has its name is never followed, emptied or removed."""

import os
import threading
import time
from pathlib import Path

import pytest

from lora_build.errors import StorageError
from lora_build.files.targets.lock import is_locked, lock, lock_path, refuse_what_is_no_lock


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "builds/out"


def refusal(target: Path) -> str:
    with pytest.raises(StorageError) as planned:
        refuse_what_is_no_lock(target)
    with pytest.raises(StorageError) as caught, lock(target):
        pytest.fail("locked")
    assert str(planned.value) == str(caught.value)
    return str(caught.value)


def test_a_lock_leaves_nothing_not_even_the_folders_made_for_it(target: Path) -> None:
    with lock(target):
        assert lock_path(target).read_text() == f"{os.getpid()}\n"
        assert is_locked(target)
    assert not target.parent.exists()
    assert not is_locked(target)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_at_its_place_is_not_followed(target: Path, tmp_path: Path, there: bool) -> None:
    target.parent.mkdir()
    keys = tmp_path / "authorized_keys"
    if there:
        keys.write_text("ssh-ed25519")
    lock_path(target).symlink_to(keys)

    assert "is a symbolic link, where the lock of a build would be; it is left alone" in refusal(target)
    assert lock_path(target).is_symlink()
    assert keys.exists() is there
    assert not there or keys.read_text() == "ssh-ed25519"


def test_a_second_name_of_somebody_s_file_is_not_emptied(target: Path, tmp_path: Path) -> None:
    target.parent.mkdir()
    (tmp_path / "empty").write_text("")
    lock_path(target).hardlink_to(tmp_path / "empty")

    assert "is a hard link" in refusal(target)
    assert (tmp_path / "empty").read_text() == ""


@pytest.mark.parametrize("text", ["mine", "12\nmine", "9" * 70])
def test_a_file_of_somebody_s_is_not_emptied(target: Path, text: str) -> None:
    target.parent.mkdir()
    lock_path(target).write_text(text)

    assert "is a file of somebody's" in refusal(target)
    assert lock_path(target).read_text() == text


def test_a_pipe_and_a_folder_are_refused_at_once(target: Path) -> None:
    target.parent.mkdir()
    os.mkfifo(lock_path(target))
    assert "is no regular file" in refusal(target)
    lock_path(target).unlink()
    lock_path(target).mkdir()
    assert "is no regular file" in refusal(target)


@pytest.mark.parametrize("text", ["", "4711\n"])
def test_what_a_killed_build_left_is_taken(target: Path, text: str) -> None:
    target.parent.mkdir()
    lock_path(target).write_text(text)

    with lock(target) as waited:
        assert not waited
    assert not lock_path(target).exists()


def test_a_lock_that_another_build_has_made_meanwhile_is_not_removed(target: Path) -> None:
    with lock(target):
        lock_path(target).unlink()
        lock_path(target).write_text("4711\n")
    assert lock_path(target).read_text() == "4711\n"


def test_one_has_it_at_a_time_and_the_next_one_is_told_that_it_waited(target: Path) -> None:
    held, told, inside = threading.Event(), [], []

    def hold(wait: float) -> None:
        with lock(target) as waited:
            told.append(waited)
            inside.append(1)
            assert len(inside) == 1
            held.set()
            time.sleep(wait)
            inside.pop()

    first = threading.Thread(target=hold, args=(0.2,))
    first.start()
    held.wait(5)
    others = [threading.Thread(target=hold, args=(0.0,)) for _ in range(4)]
    for thread in others:
        thread.start()
    for thread in (first, *others):
        thread.join(10)
    assert told == [False, True, True, True, True]
    assert not lock_path(target).exists()


def test_a_link_to_what_is_locked_is_no_lock(target: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with lock(other):
        target.parent.mkdir()
        lock_path(target).symlink_to(lock_path(other))
        assert is_locked(other)
        assert not is_locked(target)
