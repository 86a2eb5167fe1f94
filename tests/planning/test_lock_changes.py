"""What became of a locked source, and what that changes in it: each in a line that is true."""

from typing import Any

import pytest

from lora_build.files.identity import Digest
from lora_build.planning.lock_changes import SourceState, details_of, state_of
from lora_build.planning.lock_file import LockedFile, LockedSource
from lora_build.recipe.named_sources import NamedSource

MAIN, TAG = NamedSource(source="acme/math"), NamedSource(source="acme/math", revision="v2")


def locked(named: NamedSource = MAIN, commit: str = "a" * 40, **files: bytes) -> LockedSource:
    held = {name: LockedFile(size_bytes=len(data), sha256=Digest.sha256(data)) for name, data in files.items()}
    return LockedSource(named=named, commit=commit, files=held)


@pytest.mark.parametrize(
    ("named", "before", "after", "state"),
    [
        (None, locked(), None, SourceState.removed),
        (MAIN, None, locked(), SourceState.new),
        (TAG, locked(), locked(TAG), SourceState.renamed),
        (MAIN, locked(), locked(commit="b" * 40), SourceState.moved),
        (MAIN, locked(), locked(), SourceState.kept),
    ],
)
def test_a_source_stays_moves_comes_goes_or_is_named_otherwise(
    named: NamedSource | None, before: LockedSource | None, after: LockedSource | None, state: SourceState
) -> None:
    assert state_of(named, before, after) is state


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"target_modules": ["q", "v"]}, {"target_modules": ["v", "k"]}, ["target_modules: + k - q"]),
        ({"target_modules": ["q", "v"]}, {"target_modules": ["q"]}, ["target_modules: - v"]),
        ({"target_modules": ["q"]}, {"target_modules": ["v", "q"]}, ["target_modules: + v"]),
        ({"target_modules": ["q", "v"]}, {"target_modules": ["v", "q"]}, []),
        ({"r": 8}, {"r": 16, "use_dora": True}, ["r: 8 to 16", "use_dora: is true now, and was not there"]),
        ({"x": {"b": 1, "a": 2}}, {}, ['x: was {"a": 2, "b": 1}, and is not there any more']),
        ({"r": 1, "bias": "none"}, {"r": True}, ["bias: was none, and is not there any more", "r: 1 to true"]),
    ],
)
def test_keys_of_a_config_are_told_by_what_they_were_and_are(
    one: dict[str, Any], other: dict[str, Any], said: list[str]
) -> None:
    before, after = locked(old=b"1", both=b"1", same=b"1"), locked(new=b"1", both=b"2", same=b"1")
    configs = {id(before): one, id(after): other}

    found = list(details_of(before, after, lambda source: configs[id(source)]))
    assert found == [*said, "changed: both", "new: new", "gone: old"]
    assert list(details_of(before, before, lambda source: None)) == ["with the same files"]
