"""What lies where a file should: it is said what it is, nobody waits for it, and no link leads out of an input."""

import contextlib
import errno
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lora_build
from lora_build.errors import SourceError
from lora_build.files import opening
from lora_build.files.opening import mode_within, open_regular, refuse_link_away
from makers import small


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    return tmp_path


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):  # a socket's name must be short
        server.bind(path.name)


INSTEAD: dict[str, Callable[[Path], object]] = {
    "is a FIFO": os.mkfifo,
    "is a folder": Path.mkdir,
    "is a socket": bind,
    "is a device": lambda path: path.symlink_to("/dev/zero"),
    "is a link to nowhere, which cannot be read (No such file or directory)": lambda path: path.symlink_to("nowhere"),
    "cannot be read (Too many levels of symbolic links)": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("said", INSTEAD)
@pytest.mark.parametrize(
    "file", ["base/model.safetensors", "base/config.json", "math/adapter_model.safetensors", "math/adapter_config.json"]
)
def test_what_is_no_file_is_called_by_its_name(folder: Path, file: str, said: str) -> None:
    (folder / file).unlink()
    INSTEAD[said](folder / file)

    with pytest.raises(SourceError, match=re.escape(said)) as refused:
        lora_build.plan(small.recipe(folder))
    assert file.replace("math", "adapters.math") in str(refused.value)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o604])
@pytest.mark.parametrize(
    "file", ["base/model.safetensors", "base/tokenizer.json", "base/config.json", "math/adapter_model.safetensors"]
)
def test_who_may_not_read_an_input_may_not_read_what_is_made_of_it(folder: Path, file: str, mode: int) -> None:
    for path in (*(folder / "base").iterdir(), *(folder / "math").iterdir()):
        path.chmod(0o644)
    (folder / file).chmod(mode)
    lora_build.build(small.recipe(folder))

    name = "model.safetensors" if file.startswith("math") else Path(file).name
    modes = {p.name: p.stat().st_mode & 0o777 for p in (folder / "out").iterdir()}
    assert modes.pop(name) == 0o600 | (mode & 0o644)
    assert set(modes.values()) == {0o644}


def test_a_file_of_another_group_is_read_by_all_or_by_nobody_else(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.touch()
    group = file.stat().st_gid
    for mode, mine, theirs in ((0o640, 0o640, 0o600), (0o644, 0o644, 0o644), (0o604, 0o604, 0o604)):
        file.chmod(mode)
        assert (mode_within([file], group), mode_within([file], group + 1)) == (mine, theirs)


def test_a_link_that_leaves_its_input_is_refused(folder: Path) -> None:
    (folder / "secret").write_text("{}")
    (folder / "base/tokenizer.json").unlink()
    (folder / "base/tokenizer.json").symlink_to("../secret")

    with pytest.raises(SourceError, match=r"base/tokenizer.json: is a link to .*/secret, outside .*; put the file"):
        lora_build.plan(small.recipe(folder))


def test_all_links_that_leave_their_inputs_are_named(folder: Path) -> None:
    for name in ("base/tokenizer.json", "base/vocab.json"):
        (folder / "secret").write_text("{}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("../secret")

    with pytest.raises(SourceError) as refused:
        lora_build.plan(small.recipe(folder))
    assert [issue.partition(":")[0] for issue in refused.value.issues] == ["base/tokenizer.json", "base/vocab.json"]


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "base/1_Pooling").mkdir()
    real = os.scandir

    def scandir(path: Path) -> Any:
        if str(path).endswith("1_Pooling"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SourceError, match=r"^base: .* cannot be read \(Permission denied: .*1_Pooling\)$"):
        lora_build.plan(small.recipe(folder))


def test_links_within_an_input_and_those_of_the_hub_clients_cache_are_followed(folder: Path) -> None:
    expected = lora_build.build(small.recipe(folder)).manifest.manifest_hash
    (folder / "base/tokenizer.json").rename(folder / "base/tokenizer.txt")
    (folder / "base/tokenizer.json").symlink_to("tokenizer.txt")
    cached = folder / "models--acme--base/snapshots/0123"
    cached.mkdir(parents=True)
    (cached.parent.parent / "blobs").mkdir()
    for file in (folder / "base").iterdir():
        blob = cached.parent.parent / "blobs" / file.name
        blob.write_bytes(file.read_bytes())
        (cached / file.name).symlink_to(f"../../blobs/{file.name}")
    (cached / "tokenizer.txt").unlink()
    local = folder / "downloads/base"  # as older clients made of `--local-dir`
    local.mkdir(parents=True)
    for file in cached.iterdir():
        (local / file.name).symlink_to(file.resolve())

    (folder / "base/tokenizer.txt").rename(folder / "base/.hidden")
    (folder / "base/tokenizer.json").unlink()
    (folder / "base/tokenizer.json").symlink_to(".hidden")
    for base in ("base", str(cached), str(local)):
        recipe = small.recipe(folder, output={"dir": str(folder / f"of-{Path(base).parent.name}")})
        assert lora_build.build(recipe | {"base": str(folder / base)}).manifest.manifest_hash == expected


def test_what_takes_a_files_place_while_it_is_opened_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    real, before = os.open, len([*Path("/proc/self/fd").iterdir()])
    monkeypatch.setattr(opening.os, "open", lambda path, flags: real(tmp_path / "pipe", flags))

    with pytest.raises(SourceError, match=r"^x: is a FIFO; expected a regular file$"):
        open_regular(tmp_path / "file", "x")
    assert len([*Path("/proc/self/fd").iterdir()]) == before


@pytest.mark.parametrize(
    ("target", "is_allowed"),
    [
        ("repo/blobs/b", True),
        ("blobs/b", True),
        ("models--a--b/blobs/b", True),
        ("other/blobs/b", False),
        ("blob", False),
    ],
)
def test_links_lead_to_the_blobs_of_the_hubs_client_alone(tmp_path: Path, target: str, is_allowed: bool) -> None:
    root = tmp_path / "repo/snapshots/commit"
    root.mkdir(parents=True)
    (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / target).touch()
    (root / "config.json").symlink_to(tmp_path / target)

    with contextlib.nullcontext() if is_allowed else pytest.raises(SourceError, match="is a link to"):
        refuse_link_away(root, "config.json", "base/config.json")
