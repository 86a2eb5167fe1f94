"""What is read back from files that may be anybody's: of its type and size, or refused."""

import os
from pathlib import Path
from typing import Any

import pytest

from lora_build.errors import SourceError
from lora_build.files import readback


def test_a_file_is_read_up_to_the_most_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readback, "MOST_BYTES", 5)
    file = tmp_path / "file"
    file.write_bytes(b"01234")
    assert readback.read_file(file) == b"01234"

    file.write_bytes(b"012345")
    with pytest.raises(SourceError, match="has 6 bytes, expected 5 at most"):
        readback.read_file(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(SourceError, match="is not a file"):
        readback.read_file(file)
    with pytest.raises(SourceError, match="cannot be read"):
        readback.read_file(tmp_path / "gone")


@pytest.mark.parametrize("value", [-1, 1 << 63, True, 1.0, "1", None])
def test_what_is_no_count_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"is not a whole number from 0 to 2\^63"):
        readback.whole(value)


def test_a_count_is_itself() -> None:
    assert [readback.whole(value) for value in (0, 1, (1 << 63) - 1)] == [0, 1, (1 << 63) - 1]


def test_an_entry_has_its_keys_and_no_others() -> None:
    assert readback.entry({"a": 1, "b": None}, ("a",), ("b", "c")) == {"a": 1, "b": None}
    with pytest.raises(ValueError, match="`b` is missing"):
        readback.entry({"a": 1}, ("a", "b"))
    with pytest.raises(ValueError, match="'c' is no field that lora-build"):
        readback.entry({"a": 1, "c": 1}, ("a",), ("b",))


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', "NaN", "[-Infinity]", "0.5", "[", ""])
def test_json_that_says_nothing_certain_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        readback.parse_json(text.encode())


def test_json_has_floats_only_where_they_are_expected() -> None:
    assert readback.parse_json(b'{"a": [0.5, 1]}', floats=True) == {"a": [0.5, 1]}
