"""What a tokenizer's files say of its tokens; whether that is right, tests/planning/test_tokenizer.py holds."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_build.files.formats.tokenizer import Tokenizer, read_tokenizers
from lora_build.files.identity import BASE
from lora_build.files.sources.local import open_local


def read(folder: Path, files: dict[str, Any]) -> Tokenizer:
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return read_tokenizers({BASE: open_local(BASE, "here", folder)}, trains_rows=True)[BASE]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("key", ["extra_special_tokens", "additional_special_tokens"])
def test_further_special_tokens_are_special_and_come_behind_the_others(tmp_path: Path, file: str, key: str) -> None:
    found = read(tmp_path, {"vocab.json": {"a": 0, "b": 1}, file: {"pad_token": "<p>", key: ["<x>", "<y>"]}})

    assert found.special == {"<p>", "<x>", "<y>"}
    assert found.tokens == {"a": 0, "b": 1, "<p>": 2, "<x>": 3, "<y>": 4}


@pytest.mark.parametrize(
    "files",
    [
        {"a.model": "", "b.model": ""}, {"a.model": "no pieces"}, {"a.model": "\x08"}, {"a.model": ""},
        {"vocab.json": {"a": "b"}}, {"tokenizer.json": {"model": []}}, {"tokenizer.json": {"model": {"vocab": 3}}},
    ],
)  # fmt: skip
def test_tokens_of_an_unknown_vocabulary_are_not_counted(tmp_path: Path, files: dict[str, Any]) -> None:
    assert read(tmp_path, files).tokens is None
