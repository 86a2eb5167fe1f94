"""Aliases as a file beside builds: what they name and go back to, or nobody knows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_build.errors import VerificationError
from lora_build.files.identity import Digest
from lora_build.proof.aliases import ALIASES_SCHEMA, Alias, Named, aliases_in, aliases_path, in_use

HASH = Digest.sha256(b"manifest")


def alias(folder: Path) -> Alias:
    """Return `prod`, which names `two`, after it has named `one`."""
    history = tuple(
        Named(dir=folder / name, manifest_hash=HASH, when="2026-11-27T21:00:00+00:00", before=before)
        for name, before in (("one", None), ("two", 0))
    )
    return Alias(link=folder / "prod", history=history)


def write(folder: Path, document: Any) -> None:
    path = folder / ".lora-build/aliases.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))


def document(folder: Path) -> dict[str, Any]:
    return {"schema": ALIASES_SCHEMA, "aliases": [alias(folder).to_json()]}


def test_aliases_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    assert aliases_in(tmp_path) == []
    write(tmp_path, document(tmp_path))

    assert aliases_path(tmp_path) == tmp_path / ".lora-build/aliases.json"
    assert aliases_in(tmp_path) == [alias(tmp_path)]
    assert set(alias(tmp_path).to_json()["history"][0]) == {"action", "dir", "manifest_hash", "when", "before"}


def test_what_is_named_and_what_is_gone_back_to_is_in_use(tmp_path: Path) -> None:
    write(tmp_path, document(tmp_path))

    assert in_use([tmp_path, tmp_path]) == {
        tmp_path / "one": "is what prod goes back to",
        tmp_path / "two": "is in use as prod",
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["aliases"][0].update(name="../prod"), "is no name"),
        (lambda d: d["aliases"][0].update(history=[]), "prod names nothing"),
        (lambda d: d["aliases"][0]["history"][0].update(before=0), "prod goes back to what comes later"),
        (lambda d: d["aliases"][0]["history"][0].pop("action"), "`action` is missing"),
        (lambda d: d.update(schema="lora-build/aliases/v9"), "newer"),
    ],
    ids=["a path", "no history", "a circle", "no action", "a version"],
)
def test_aliases_that_cannot_be_read_are_refused(tmp_path: Path, change: Callable[[Any], object], said: str) -> None:
    found = document(tmp_path)
    change(found)
    write(tmp_path, found)

    with pytest.raises(VerificationError, match=rf"nobody knows which builds are in use \(.*{said}.*\); restore it"):
        aliases_in(tmp_path)
