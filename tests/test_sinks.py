"""The commit protocol: everything is on the disk before the one rename, and an old build is swapped, never absent."""

from pathlib import Path

import pytest

from lora_build import sinks
from lora_build.sinks import DirectorySink


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reaches the disk, in order."""
    done: list[str] = []

    def spy(owner: object, name: str, describe: object) -> None:
        real = getattr(owner, name)

        def wrapped(*args: object, **kwargs: object) -> object:
            done.append(describe(*args))  # type: ignore[operator]
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    spy(sinks.os, "fsync", lambda fd: f"sync {Path('/proc/self/fd', str(fd)).readlink().name}")
    spy(Path, "rename", lambda self, target: f"rename to {Path(target).name}")
    spy(sinks, "_exchange", lambda new, old: f"swap with {old.name}")
    return done


def build(target: Path, text: bytes) -> None:
    with DirectorySink(target) as sink:
        sink.write("sub/a", text)
        sink.write("manifest", b"m")
        sink.commit()


def test_files_and_folders_are_synced_before_the_rename_and_the_parent_after_it(
    tmp_path: Path, calls: list[str]
) -> None:
    build(tmp_path / "out", b"new")

    assert calls == [
        "sync a", "sync manifest", "sync .out.lora-build.tmp", "sync sub", "rename to out", f"sync {tmp_path.name}",
    ]  # fmt: skip


def test_an_old_build_is_swapped_in_one_step(tmp_path: Path, calls: list[str]) -> None:
    build(tmp_path / "out", b"old")
    calls.clear()
    build(tmp_path / "out", b"new")

    assert "swap with out" in calls
    assert not [call for call in calls if call.startswith("rename")]
    assert (tmp_path / "out/sub/a").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_where_the_kernel_cannot_swap_two_renames_do(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "out", b"old")
    calls.clear()
    monkeypatch.setattr(sinks, "_LIBC", object())
    build(tmp_path / "out", b"new")

    assert [call for call in calls if call.startswith("rename")] == ["rename to .out.lora-build.old", "rename to out"]
    assert (tmp_path / "out/sub/a").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    with DirectorySink(tmp_path / "out") as sink:
        (sink.staging / "a").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(sinks.StorageError):
            sink.write("a", b"x")
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_is_free_again_and_its_file_gone_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), sinks.lock(tmp_path / "out"):
            raise KeyError
    assert not list(tmp_path.iterdir())


def test_what_fell_between_two_renames_is_removed_by_the_next_build(tmp_path: Path) -> None:
    (tmp_path / ".out.lora-build.old").mkdir()
    build(tmp_path / "out", b"new")

    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_write_protected_folders_are_opened_before_they_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old/sub").mkdir(parents=True)
    for folder in (tmp_path / "old/sub", tmp_path / "old"):
        folder.chmod(0o555)
    modes: list[int] = []
    monkeypatch.setattr(
        sinks.shutil, "rmtree", lambda top: modes.extend(p.stat().st_mode & 0o777 for p in (top, top / "sub"))
    )
    sinks._remove(tmp_path / "old")

    assert modes == [0o700, 0o700]
