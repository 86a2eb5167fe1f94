"""Builds of one build_key: the second is a clone of the first, where the file system can, with the same bytes and proof."""

import dataclasses
import os
import stat
from pathlib import Path

import pytest

import lora_build
from lora_build.cli import text
from lora_build.cli.lines import plain
from lora_build.engine import execute
from lora_build.files.targets import cloning
from lora_build.proof.manifest import MANIFEST_NAME, PROVENANCE_NAME, SURVIVAL_NAME
from makers import small

REFLINK = cloning.reflink  # as it is before a test replaces it


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small.make_base(tmp_path / "base", shards=True)
    small.make_adapter(tmp_path / "math")
    small.make_adapter(tmp_path / "code", seed=90)
    return tmp_path


@pytest.fixture
def clones(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Clone by copying, which file systems without clones can too; returns the sizes of what was cloned."""
    sizes: list[int] = []

    def reflink(source: int, target: int) -> None:
        data = os.pread(source, 1 << 30, 0)
        sizes.append(os.pwrite(target, data, 0))

    monkeypatch.setattr(cloning, "reflink", reflink)
    return sizes


def build(name: str, **more: object) -> lora_build.Build:
    data = {"base": "./base", "adapters": {"math": "./math", "code": "./code"}, "output": f"builds/{name}"}
    return lora_build.build(data | more)


def test_a_second_build_of_one_key_is_a_clone_with_the_same_bytes_and_manifest(
    folder: Path, clones: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build("one")
    monkeypatch.setattr(execute, "execute", None)  # nothing is merged
    second = build("two")
    assert (first.cloned_from, second.cloned_from) == (None, folder / "builds/one")
    assert second.manifest == first.manifest
    for name in (MANIFEST_NAME, SURVIVAL_NAME, *(file.path for file in first.manifest.files)):
        assert (folder / "builds/two" / name).read_bytes() == (folder / "builds/one" / name).read_bytes()
        assert (folder / "builds/two" / name).stat().st_nlink == 1
    assert len(clones) == len(first.manifest.files) == 5
    lora_build.verify("builds/two", strict=True)
    assert second.survival == first.survival
    assert any(", cloned from builds/one" in line for said in text.built_lines(second) for line in plain(said))
    assert build("two").reused
    assert build("three").cloned_from is not None


def test_a_clone_has_the_modes_of_what_it_was_made_of(folder: Path, clones: list[int]) -> None:
    build("one")
    (folder / "math/adapter_model.safetensors").chmod(0o600)
    weights = build("two").dir / "model-00001-of-00002.safetensors"
    assert clones
    assert stat.S_IMODE(weights.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "more", [{"dtype": "float32"}, {"adapters": "./math"}, {"combine": {"method": "svd"}}, {"numerics": "peft"}]
)
def test_another_key_has_no_clone(folder: Path, clones: list[int], more: dict[str, object]) -> None:
    build("one")
    try:
        build("two", **more)
    except lora_build.LoraBuildError:
        assert "combine" in more
    assert clones == []


def test_what_is_to_be_written_anew_is(folder: Path, clones: list[int]) -> None:
    build("one")
    assert build("two", output={"dir": "builds/two", "if_exists": "overwrite"}).cloned_from is None


def test_adapters_of_other_names_are_no_clone_since_the_report_names_them(folder: Path, clones: list[int]) -> None:
    first = build("one")
    second = build("two", adapters={"code": "./math", "math": "./code"})
    assert second.manifest.build_key == first.manifest.build_key
    assert second.cloned_from is None
    assert {share.adapter: share.update_norm for share in second.survival[0].shares} != {
        share.adapter: share.update_norm for share in first.survival[0].shares
    }


def flip(path: Path) -> None:
    """Change a byte in place, and have size and times be as they were."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00002.safetensors", SURVIVAL_NAME])
def test_a_build_of_which_a_byte_changed_is_not_cloned(folder: Path, clones: list[int], name: str) -> None:
    first = build("one")
    flip(folder / "builds/one" / name)
    second = build("two")
    assert (second.cloned_from, second.manifest) == (None, first.manifest)
    lora_build.verify("builds/two")
    assert not list((folder / "builds").glob(".*"))


def test_a_file_that_changes_while_it_is_cloned_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("one")

    def reflink(source: int, target: int) -> None:
        os.pwrite(target, os.pread(source, 1 << 30, 0), 0)
        for path in (folder / "builds/one").iterdir():
            if path.stat().st_ino == os.fstat(source).st_ino:
                flip(path)

    monkeypatch.setattr(cloning, "reflink", reflink)
    assert build("two").cloned_from is None
    lora_build.verify("builds/two")


def test_a_folder_that_somebody_made_up_is_not_cloned(folder: Path, clones: list[int]) -> None:
    """Its manifest says the same build_key, and is right about its own, other bytes."""
    first = build("one")
    file = folder / "builds/one/tokenizer.json"
    file.write_text('{"evil": 1}')
    files = tuple(
        dataclasses.replace(f, size_bytes=len(file.read_bytes()), sha256=type(f.sha256).sha256(file.read_bytes()))
        if f.path == "tokenizer.json" else f for f in first.manifest.files
    )  # fmt: skip
    made_up = dataclasses.replace(first.manifest, files=files)
    (folder / "builds/one" / MANIFEST_NAME).write_bytes(made_up.to_bytes())
    (folder / "builds/one" / PROVENANCE_NAME).unlink()
    assert lora_build.verify("builds/one").manifest_hash != first.manifest.manifest_hash
    assert build("two").manifest == first.manifest
    assert clones == []


def test_a_build_that_came_from_elsewhere_is_not_cloned(
    folder: Path, clones: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    build("one")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "another"))
    assert build("two").cloned_from is None


@pytest.mark.parametrize("where", ["links", "a link for a file", "a pipe", "elsewhere"])
def test_no_link_or_pipe_is_cloned_and_nothing_outside_the_output_folders(
    folder: Path, clones: list[int], where: str
) -> None:
    build("one")
    one, file = folder / "builds/one", folder / "builds/one/tokenizer.json"
    if where in ("links", "elsewhere"):
        one.rename(folder / "moved")
        if where == "links":
            one.symlink_to(folder / "moved")
    elif where == "a link for a file":
        file.rename(folder / "t.json")
        file.symlink_to(folder / "t.json")
    else:
        file.unlink()
        os.mkfifo(file)
    assert build("two").cloned_from is None
    lora_build.verify("builds/two")


@pytest.mark.parametrize(("where", "is_found"), [("one", True), ("runs/one", False)])
def test_beside_an_output_folder_of_its_own_nothing_is_looked_for_deeper_down(
    folder: Path, clones: list[int], where: str, is_found: bool
) -> None:
    first = build("one", output=f"elsewhere/{where}").dir
    assert build("two", output="elsewhere/two").cloned_from == (first if is_found else None)


def test_where_the_file_system_cannot_clone_it_is_built(folder: Path) -> None:
    first, second = build("one"), build("two")
    assert (second.cloned_from, second.manifest) == (None, first.manifest)


def test_a_clone_takes_the_place_of_a_stale_build_and_passes_its_checks(folder: Path, clones: list[int]) -> None:
    build("two", dtype="float32")
    build("one")
    with pytest.raises(lora_build.RecipeError):
        lora_build.build(
            {
                "base": "./base",
                "adapters": {"math": "./math", "code": "./code"},
                "output": "builds/two",
                "name": "other",
            }
        )
    built = build("two")
    assert (built.cloned_from, built.replaced is not None) == (folder / "builds/one", True)
    lora_build.verify("builds/two")


def test_a_twin_is_found_in_another_folder_below_builds(folder: Path, clones: list[int]) -> None:
    build("team/one")
    assert build("two").cloned_from == folder / "builds/team/one"


def test_a_real_clone_shares_no_inode(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(bytes(range(256)) * 100)
    fd = os.open(target, os.O_WRONLY | os.O_CREAT)
    try:
        with source.open("rb") as file:
            REFLINK(file.fileno(), fd)
    except OSError as error:
        pytest.skip(f"this file system cannot clone: {error.strerror}")
    finally:
        os.close(fd)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_ino != source.stat().st_ino
