"""The tokenizer of a build reads and writes as that of what it was made of, or the check says how not."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import lora_build
from lora_build.errors import SourceError, VerificationError
from lora_build.files.formats.side_files import is_tokenizer_file
from lora_build.proof.forward import apart
from lora_build.proof.forward.apart import ApartError, done_apart
from lora_build.proof.forward.inputs import Prompts, questions
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


def test_a_build_of_which_no_tokenizer_was_ever_said_fails_where_the_base_has_one(tmp_path: Path) -> None:
    out = build(tmp_path)
    manifest = read_manifest(out)
    inputs = reopen(out, manifest)
    lost = [file.path for file in manifest.files if is_tokenizer_file(file.path)]
    for name in lost:
        (out / name).unlink()
    without = dataclasses.replace(manifest, files=tuple(file for file in manifest.files if file.path not in lost))

    with pytest.raises(VerificationError, match="transformers does not load the build's, but the other"):
        compare_tokenizers(out, without, inputs)


def test_a_tokenizer_that_nobody_loads_is_a_note(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    out = Path(lora_build.build(small.recipe(tmp_path)).dir)
    assert "transformers loads neither the tokenizer of base nor the build's" in compare(out)

    (tmp_path / "base" / "tokenizer.json").unlink()
    assert compare(Path(lora_build.build(small.recipe(tmp_path)).dir)) == "there is no tokenizer to compare"


def test_a_tokenizer_that_swells_what_it_reads_is_refused_and_ends_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = build(tmp_path)
    rule = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    edit_json(out / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [rule] * 40})
    monkeypatch.setattr(apart, "MEMORY_BYTES", 64 << 20)

    with pytest.raises(
        VerificationError, match="the tokenizer of the build cannot read a few lines of text: it ended "
    ):
        compare(out)
    with pytest.raises(
        SourceError, match=r"prompts: the tokenizer of out cannot read them: it ended its process \(SIG"
    ):
        questions(
            SimpleNamespace(config=LlamaConfig(), main_input_name="input_ids", forward=len),
            out,
            Prompts(texts=("eel",)),
        )


def test_work_apart_is_bounded_and_says_how_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    assert done_apart(lambda: {"a": [1, None]}) == {"a": [1, None]}
    with pytest.raises(ApartError, match=r"^KeyError: 'x'$"):
        done_apart(lambda: {}["x"])
    with pytest.raises(ApartError, match="SIGABRT"):
        done_apart(os.abort)
    with pytest.raises(ApartError, match="exit code 0"):
        done_apart(lambda: os._exit(0))
    monkeypatch.setattr(apart, "_MAX_ANSWER_BYTES", 1 << 20)
    with pytest.raises(ApartError, match="answers with over 1 MiB"):
        done_apart(lambda: "x" * (2 << 20))
    monkeypatch.setattr(apart, "SECONDS", 0.1)
    with pytest.raises(ApartError, match=r"longer than 0\.1 seconds"):
        done_apart(lambda: time.sleep(60))
    with pytest.raises(ChildProcessError):  # none is left
        os.waitpid(-1, os.WNOHANG)


def test_work_apart_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert done_apart(lambda: [os.write(fd, b"said\n") for fd in (1, 2)] + [len(os.read(0, 1))]) == [5, 5, 0]
    assert capfd.readouterr() == ("", "")
