"""The tokenizer of a build reads and writes as that of what it was made of, or the check says how not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lora_build
from lora_build.errors import VerificationError
from lora_build.proof.forward.tokenizers import compare_tokenizers
from lora_build.proof.manifest import read_manifest
from lora_build.proof.reopen import reopen
from makers import small

WORDS = ["[UNK]", "</s>", "The", "quick", "brown", "fox", ".", "=", "#"]


def tokenizer(folder: Path, words: list[str]) -> None:
    """Write a tokenizer of words into a folder."""
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=found, unk_token="[UNK]", eos_token="</s>")
    made.chat_template = "{{ messages[0].content }}"
    made.save_pretrained(folder)


def build(folder: Path) -> Path:
    """Build `math` on a base with a tokenizer, and return the output's folder."""
    small.make_base(folder / "base", model_type="llama")
    tokenizer(folder / "base", WORDS)
    small.make_adapter(folder / "math")
    return Path(lora_build.build(small.recipe(folder)).dir)


def compare(out: Path) -> str:
    """Return what a comparison says."""
    manifest = read_manifest(out)
    return compare_tokenizers(out, manifest, reopen(out, manifest))


def test_a_tokenizer_that_went_along_is_the_same(tmp_path: Path) -> None:
    assert compare(build(tmp_path)) == ""


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: tokenizer(out, [*WORDS[:2], *reversed(WORDS[2:])]), r"'The quick brown fox .*' has ids \["),
        (lambda out: tokenizer(out, [*WORDS, "jumps"]), "10 tokens in place of 9"),
        (lambda out: (out / "chat_template.jinja").write_text("{{ 1 }}"), "it has another chat template"),
        (lambda out: edit_json(out / "tokenizer_config.json", eos_token="."), "special tokens"),
        (lambda out: (out / "tokenizer.json").unlink(), "transformers does not load the build's, but the other"),
    ],
    ids=["other ids", "more tokens", "other template", "other eos", "lost"],
)
def test_a_tokenizer_that_differs_fails_the_check(
    change: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    out = build(tmp_path)
    change(out)

    with pytest.raises(VerificationError, match=message):
        compare(out)


def test_a_tokenizer_that_nobody_loads_is_a_note(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    out = Path(lora_build.build(small.recipe(tmp_path)).dir)
    assert "transformers loads neither the tokenizer of base nor the build's" in compare(out)

    (tmp_path / "base" / "tokenizer.json").unlink()
    assert compare(Path(lora_build.build(small.recipe(tmp_path)).dir)) == "there is no tokenizer to compare"
