"""What each release has built is read and verified by every later one."""

import json
import re
from pathlib import Path

import pytest

import lora_build
from lora_build.proof.manifest import MANIFEST_NAME, PROVENANCE_NAME, SURVIVAL_NAME
from lora_build.proof.provenance import read
from lora_build.proof.survival_report import read_survival

FOLDER = Path(__file__).with_name("releases")
BUILDS = sorted(path.parent for path in FOLDER.rglob(MANIFEST_NAME))


def test_this_version_s_builds_are_kept() -> None:
    base = re.match(r"\d+\.\d+\.\d+", lora_build.__version__)
    assert base is not None
    assert {folder.name for folder in BUILDS if folder.parent.name == base[0]} == {"plain", "shards"}
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 100_000 * len(BUILDS)


@pytest.mark.parametrize("folder", BUILDS, ids=lambda folder: f"{folder.parent.name} {folder.name}")
def test_what_a_release_has_built_is_read_and_verified(folder: Path) -> None:
    found = lora_build.verify(folder)

    assert (found.notes, found.additions) == ((), ())
    assert (
        found.manifest_hash == json.loads((FOLDER / "hashes.json").read_text())[f"{folder.parent.name}/{folder.name}"]
    )
    assert read((folder / PROVENANCE_NAME).read_bytes(), PROVENANCE_NAME).recipe["adapters"]
    assert read_survival(folder)
    assert (folder / SURVIVAL_NAME).is_file()
