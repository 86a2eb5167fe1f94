"""What a plan asks of a manifest is remembered by its bytes, and only what was a manifest."""

from pathlib import Path

import pytest

import lora_build
from lora_build.errors import SourceError, VerificationError
from lora_build.files.hashing import remembered
from lora_build.proof import known_manifest
from lora_build.proof.known_manifest import KnownManifest
from lora_build.proof.manifest import MANIFEST_NAME, Manifest, read_manifest
from makers import small


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    return lora_build.build(small.recipe(tmp_path)).dir


def test_it_says_what_the_manifest_says(build: Path) -> None:
    whole = read_manifest(build)
    for known in (KnownManifest.read(build), KnownManifest.read(build)):
        assert known.manifest_hash == whole.manifest_hash
        assert (known.build_key, known.files, known.whole) == (whole.build_key, whole.files, whole)


def test_a_manifest_is_parsed_once(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KnownManifest.read(build)
    monkeypatch.setattr(Manifest, "from_bytes", None)
    known = KnownManifest.read(build)
    assert len(known.files) == 3


def test_what_was_remembered_with_another_meaning_is_parsed_again(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KnownManifest.read(build)
    parsed: list[str] = []
    from_bytes = Manifest.from_bytes
    monkeypatch.setattr(Manifest, "from_bytes", lambda data, where: parsed.append(where) or from_bytes(data, where))
    for _ in range(2):
        monkeypatch.setattr(known_manifest, "_MEANING", "manifest-of-tomorrow")
        KnownManifest.read(build)
    assert parsed == [str(build / MANIFEST_NAME)]


def test_a_manifest_of_other_bytes_is_not_known(build: Path) -> None:
    KnownManifest.read(build)
    file = build / MANIFEST_NAME
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F16"').replace(b'"BF16"', b'"FF16"', 1))
    with pytest.raises(VerificationError, match="was edited"):
        KnownManifest.read(build)
    with pytest.raises(VerificationError, match="was edited"):  # nothing is remembered of it
        KnownManifest.read(build)
    file.unlink()
    with pytest.raises(SourceError, match="not a build of lora-build"):
        KnownManifest.read(build)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"build_key": "sha256:1", "files": []}', "[" * 9999, "\0", '{"build_key": 1, "files": 2}']
)
def test_what_is_remembered_and_is_nothing_of_ours_is_not_believed(build: Path, text: str) -> None:
    KnownManifest.read(build)
    (file,) = (path for path in (remembered.cache_dir() / "manifests").rglob("*") if path.is_file())
    file.write_text(text)
    assert KnownManifest.read(build).build_key == read_manifest(build).build_key
