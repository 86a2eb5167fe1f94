"""A directory as the target: what is there is looked at again, and nothing of anybody else's is replaced or removed."""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lora_build.errors import StorageError
from lora_build.files.targets import contents, disk, moves
from lora_build.files.targets.contents import Contents
from lora_build.files.targets.directory import DirectoryTarget
from lora_build.files.targets.staging import clear_stagings, make_staging, remove_made, stagings_in

MANIFEST = "manifest"


@dataclass
class Toy:
    """Builds whose own files are `weights` and `manifest`; `seen` is called whenever one is looked at."""

    text: str = "old"
    seen: list[Callable[[Path], None]] = field(default_factory=list)

    def names(self, folder: Path) -> Contents:
        if not (folder / MANIFEST).is_file():
            raise StorageError(f"{folder}: no build")
        found = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()]
        return Contents(own=("weights", MANIFEST), others=tuple(sorted(set(found) - {"weights", MANIFEST})))

    def look(self, folder: Path) -> Contents:
        if self.seen:
            self.seen.pop(0)(folder)
        if not (folder / MANIFEST).is_file() or (folder / MANIFEST).read_text() != self.text:
            raise StorageError(f"{folder}: changed")
        return self.names(folder)


def make(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights").write_text(text)
    (folder / MANIFEST).write_text(text)
    return folder


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def commit(target: Path, occupant: Toy | None, text: str = "new", meanwhile: Callable[[], object] = lambda: 0) -> None:
    with DirectoryTarget(target, occupant) as staged:
        staged.write("weights", text.encode())
        staged.write(MANIFEST, text.encode())
        meanwhile()
        staged.commit()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A build that people live in."""
    out = make(tmp_path / "out", "old")
    (out / "README.md").write_text("mine")
    (out / "scores/deep").mkdir(parents=True)
    (out / "scores/deep/sums.json").write_text("[1]")
    (out / "link").symlink_to("/nowhere")
    return out


def is_whole(out: Path, text: str) -> bool:
    assert listing(out.parent) == ["out"]
    return has_all(out, text)


def has_all(out: Path, text: str) -> bool:
    assert (out / "README.md").read_text() == "mine"
    assert (out / "scores/deep/sums.json").read_text() == "[1]"
    assert (out / "link").readlink() == Path("/nowhere")
    return (out / MANIFEST).read_text() == (out / "weights").read_text() == text


@pytest.fixture(params=["swap", "two renames", "copies"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Replace as the file system lets us: by a swap, by two renames where it knows no flags, and without hard links."""
    way: str = request.param
    if way == "two renames":
        monkeypatch.setattr(moves, "_EXCHANGE", 1 << 30)  # EINVAL, as of NFS
        monkeypatch.setattr(moves, "_NOREPLACE", 1 << 30)
    if way == "copies":

        def link(*_: object, **__: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(contents.os, "link", link)
    return way


@pytest.mark.usefixtures("way")
def test_a_new_build_keeps_what_people_put_into_the_old_one(out: Path) -> None:
    (out / "scores").chmod(0o700)
    commit(out, Toy())
    assert is_whole(out, "new")
    assert (out / "scores").stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("there", [None, "an empty folder"])
def test_a_build_goes_where_nothing_is(tmp_path: Path, there: str | None) -> None:
    if there:
        (tmp_path / "out").mkdir()
    commit(tmp_path / "out", None)
    assert (tmp_path / "out/weights").read_text() == "new"
    assert listing(tmp_path) == ["out"]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("there", ["nothing", "an empty folder"])
@pytest.mark.parametrize("what", ["a folder", "a file", "a link", "a dangling link"])
def test_what_somebody_puts_there_meanwhile_is_left_alone(tmp_path: Path, there: str, what: str) -> None:
    out = tmp_path / "out"
    if there != "nothing":
        out.mkdir()

    def put() -> None:
        if what == "a folder":
            out.mkdir(exist_ok=True)
            (out / "thesis").write_text("mine")
            return
        if out.is_dir():
            out.rmdir()
        out.write_text("mine") if what == "a file" else out.symlink_to("thesis" if what == "a link" else "nowhere")

    (tmp_path / "thesis").mkdir()
    with pytest.raises(StorageError, match="was put there while the build ran; it is left alone"):
        commit(out, None, meanwhile=put)
    assert listing(tmp_path) == ["out", "thesis"]
    assert what != "a folder" or (out / "thesis").read_text() == "mine"
    assert what != "a file" or out.read_text() == "mine"
    assert "link" not in what or out.is_symlink()
    assert listing(tmp_path / "thesis") == []


@pytest.mark.usefixtures("way")
def test_a_build_that_is_another_one_by_then_is_left_alone(out: Path) -> None:
    with pytest.raises(StorageError, match="changed"):
        commit(out, Toy(), meanwhile=lambda: [(out / name).write_text("other") for name in ("weights", MANIFEST)])
    assert is_whole(out, "other")


@pytest.mark.usefixtures("way")
def test_what_came_out_is_put_back_if_it_is_not_what_was_seen(out: Path) -> None:
    toy = Toy(seen=[lambda _: None, lambda folder: (folder / MANIFEST).write_text("edited") and None])
    with pytest.raises(StorageError, match="changed"):
        commit(out, toy)
    assert (out / MANIFEST).read_text() == "edited"
    (out / MANIFEST).write_text("old")
    assert is_whole(out, "old")


@pytest.mark.usefixtures("way")
def test_a_file_that_people_add_at_the_last_moment_is_kept(out: Path) -> None:
    toy = Toy(seen=[lambda _: None, lambda folder: (folder / "late.json").write_text("late") and None])
    commit(out, toy)
    assert (out / "late.json").read_text() == "late"
    assert is_whole(out, "new")


@pytest.mark.usefixtures("way")
def test_a_file_that_people_change_at_the_last_moment_is_kept_as_it_is_then(out: Path) -> None:
    def replace(folder: Path) -> None:
        (folder / "README.md.new").write_text("mine, and longer")
        (folder / "README.md.new").rename(folder / "README.md")

    commit(out, Toy(seen=[lambda _: None, replace]))
    assert (out / "README.md").read_text() == "mine, and longer"


@pytest.mark.usefixtures("way")
def test_a_folder_that_never_rests_is_left_alone(out: Path) -> None:
    def add(folder: Path) -> None:
        (folder / f"log-{len(list(folder.iterdir()))}").write_text("x")

    with pytest.raises(StorageError, match="changes while it is read; build again at rest"):
        commit(out, Toy(seen=[add] * 9))
    assert (out / MANIFEST).read_text() == "old"
    assert listing(out.parent) == ["out"]


@pytest.mark.usefixtures("way")
def test_a_file_of_a_name_that_the_build_has_too_is_not_overwritten(out: Path) -> None:
    (out / "more.json").write_text("mine")
    with DirectoryTarget(out, Toy()) as staged:
        for name in ("weights", MANIFEST, "more.json"):
            staged.write(name, b"new")
        with pytest.raises(StorageError, match="was put there while the build ran, which has a file of that name"):
            staged.commit()
    assert (out / "more.json").read_text() == "mine"
    assert is_whole(out, "old")


@pytest.mark.parametrize("name", [".out.lora-build.tmp", ".out.lora-build.old"])
@pytest.mark.parametrize("what", ["a folder", "a link", "a file"])
def test_what_has_the_name_of_a_staging_folder_is_left_alone(out: Path, name: str, what: str) -> None:
    place = out.with_name(name)
    (out.parent / "mine").mkdir()
    (out.parent / "mine/x").write_text("mine")
    if what == "a folder":
        (out.parent / "mine").rename(place)
    elif what == "a link":
        place.symlink_to("mine")
    else:
        place.write_text("mine")

    assert clear_stagings(out, Toy()) == ()
    commit(out, Toy())
    assert (out / "weights").read_text() == "new"
    assert place.read_text() == "mine" if what == "a file" else (place / "x").read_text() == "mine"


def test_a_staging_folder_is_known_by_what_is_in_it_and_by_whose_it_is(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = make_staging(out)
    other = make_staging(out.with_name("other"))
    (out.parent / ".fake.lora-build.tmp").mkdir()
    moved = other.folder.rename(out.with_name(".third.lora-build.tmp"))

    assert [found.folder for found in stagings_in(out.parent)] == [staging.folder]
    assert moved.exists()
    clear_stagings(out, Toy())
    assert not staging.folder.exists()


def test_a_marker_that_is_a_link_marks_nothing(out: Path) -> None:
    staging = make_staging(out)
    marker = staging.folder / "lora-build.staging"
    marker.rename(out.parent / "elsewhere")
    marker.symlink_to(out.parent / "elsewhere")

    assert list(stagings_in(out.parent)) == []


@pytest.mark.parametrize("name", ["build", "old", "gone"])
def test_a_staging_folder_that_holds_a_link_is_none_of_ours(out: Path, name: str) -> None:
    release = make(out.parent / "release", "old")
    (release / "NOTES").write_text("mine")
    release.chmod(0o755)
    staging = make_staging(out)
    remove_made(staging.build)
    (staging.folder / name).symlink_to(release)

    assert clear_stagings(out, Toy()) == ()
    commit(out, Toy())
    assert listing(release) == ["NOTES", "manifest", "weights"]
    assert release.stat().st_mode & 0o777 == 0o755
    assert has_all(out, "new")


def test_a_staging_folder_of_another_user_is_none_of_ours(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_staging(out)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)

    assert list(stagings_in(out.parent)) == []


def test_a_link_in_the_place_of_what_versions_before_left_is_left_alone(out: Path) -> None:
    release = out.rename(out.parent / "release")
    out.with_name(".out.lora-build.old").symlink_to(release)

    assert clear_stagings(out, Toy()) == ()
    commit(out, None)
    assert has_all(release, "old")
    assert out.with_name(".out.lora-build.old").is_symlink()


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_mounted_in_a_build_meanwhile_is_left_alone(
    out: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    (out / "eval").mkdir()
    (out / "eval/scores").write_text("mine")

    def mounted(folder: Path) -> str | None:
        return str(folder / "eval") if (folder == out) == (when == "before") else None

    monkeypatch.setattr("lora_build.files.targets.directory.mounted_below", mounted)
    with pytest.raises(StorageError, match=r"out/eval: something was mounted there while the build ran"):
        commit(out, Toy())
    assert is_whole(out, "old")
    assert (out / "eval/scores").read_text() == "mine"


def test_a_folder_beside_it_that_is_emptied_meanwhile_keeps_its_place(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = out.with_name("beside")
    beside.mkdir(mode=0o750)
    monkeypatch.setattr(moves, "_is_full", lambda path: path == beside)

    moves.refuse_immovable(out)
    assert has_all(out, "old")
    assert listing(beside) == []
    assert beside.stat().st_mode & 0o777 == 0o750


def test_what_a_kill_between_two_renames_left_is_put_back(out: Path) -> None:
    staging = make_staging(out)
    out.rename(staging.old)
    make(staging.build / "x", "half")

    (said,) = clear_stagings(out, Toy())
    assert "put" in said
    assert is_whole(out, "old")


def test_what_versions_before_left_between_two_renames_is_put_back(out: Path) -> None:
    out.rename(out.with_name(".out.lora-build.old"))
    clear_stagings(out, Toy())
    assert is_whole(out, "old")


def test_a_replaced_build_with_files_that_are_nowhere_else_is_not_removed_before_they_are_safe(out: Path) -> None:
    staging = make_staging(out)
    out.rename(staging.old)
    make(out, "new")

    assert clear_stagings(out, Toy()) == ()
    assert is_whole(out, "new")


@pytest.mark.parametrize("stays", ["weights", "README.md", "link"])
def test_a_replaced_build_of_which_a_file_cannot_be_removed_is_known_to_the_next_build(
    out: Path, monkeypatch: pytest.MonkeyPatch, stays: str
) -> None:
    real = os.unlink

    def unlink(path: Path, **more: Any) -> None:
        if Path(path).parts[-2:] == ("gone", stays):
            raise OSError(errno.EIO, "Input/output error")
        real(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        commit(out, Toy())
        assert (out.parent / ".out.lora-build.tmp/gone" / MANIFEST).is_file()
        clear_stagings(out, Toy("new"))
    assert clear_stagings(out, Toy("new")) == ()
    assert has_all(out, "new")


def test_a_replaced_build_with_files_that_differ_is_kept_and_said(out: Path) -> None:
    staging = make_staging(out)
    out.rename(staging.old)
    make(out, "new")
    (out / "README.md").write_text("another text")

    (said,) = clear_stagings(out, Toy())
    assert "it is kept" in said
    assert (staging.gone / "README.md").read_text() == "mine"
    assert (out / "README.md").read_text() == "another text"


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EBUSY])
def test_a_folder_that_cannot_be_moved_is_left_alone_with_the_reason(
    out: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> bool:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(moves, "_renameat2", refuse)
    with pytest.raises(StorageError, match=r"lower layer of an overlay|is a mount point"):
        commit(out, Toy())
    monkeypatch.undo()
    assert is_whole(out, "old")


def test_an_overlay_is_asked_before_the_work(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, other: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr("lora_build.files.targets.directory.is_on_overlay", lambda _: True)
    commit(out, Toy())
    assert is_whole(out, "new")
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="lower layer of an overlay"), DirectoryTarget(out, Toy(text="new")):
        pytest.fail("begun")
    assert is_whole(out, "new")


def test_a_write_protected_build_is_replaced(out: Path) -> None:
    (out / "scores").chmod(0o555)
    out.chmod(0o555)
    commit(out, Toy())
    assert is_whole(out, "new")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("step", ["_sync_folder", "take_along", "exchange", "is_taken"])
def test_an_interrupt_at_any_step_leaves_one_of_both(out: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def interrupt(*_: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(f"lora_build.files.targets.directory.{step}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        commit(out, Toy())
    assert is_whole(out, "old") or is_whole(out, "new")


def test_a_link_to_a_staging_folder_is_none(out: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    staging = make_staging(other / out.name)
    out.with_name(staging.folder.name).symlink_to(staging.folder)

    assert list(stagings_in(out.parent)) == []
    assert [found.folder for found in stagings_in(other)] == [staging.folder]


def test_a_folder_in_the_place_of_a_file_has_not_taken_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")

    taken = {
        (a, b): contents.is_taken(tmp_path / a, tmp_path / b)
        for a in ("file", "folder", "link")
        for b in ("file", "folder", "link")
    }
    assert [pair for pair, is_taken in taken.items() if is_taken] == [
        (name, name) for name in ("file", "folder", "link")
    ]


def test_where_renames_take_no_flags_an_empty_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "new", "new")
    (tmp_path / "place").mkdir()
    monkeypatch.setattr(moves, "_renameat2", lambda *_: False)

    with pytest.raises(FileExistsError):
        moves.put(tmp_path / "new", tmp_path / "place")
    assert listing(tmp_path / "place") == []


def test_a_folder_that_nobody_may_list_is_not_asked_whether_it_is_full(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert moves._is_full(out)
    monkeypatch.setattr(moves.os, "access", lambda path, mode: False)
    assert not moves._is_full(out)


def test_what_is_mounted_below_a_folder_is_told_from_the_folder_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = dict.fromkeys((str(tmp_path), str(tmp_path / "a/b"), str(tmp_path / "c"), f"{tmp_path}beside"), "ext4")
    monkeypatch.setattr(disk, "_mounts", lambda: mounts)

    assert disk.mounted_below(tmp_path) == str(tmp_path / "a/b")
    assert disk.mounted_below(tmp_path / "c") is None
    assert disk.is_mount_point(tmp_path / "c")


def test_a_staging_folder_that_was_copied_with_half_a_build_is_not_put_where_one_was(out: Path) -> None:
    staging = make_staging(out)
    (staging.build / "weights").write_text("half")
    staging.build.rename(staging.folder / "x")
    shutil.copytree(staging.folder / "x", staging.build)  # another inode
    shutil.rmtree(staging.folder / "x")
    shutil.rmtree(out)

    (said,) = clear_stagings(out, Toy())
    assert "it is kept" in said
    assert not out.exists()
    assert (staging.build / "weights").read_text() == "half"
