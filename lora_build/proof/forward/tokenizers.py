"""The tokenizer: whether a build reads and writes text as what it was made of.

The weights may be right and the answers nonsense: a build that lost a file of its tokenizer reads every word as
unknown. So the tokenizer of the base, or of the adapter whose files the build has, and that of the build are both
loaded and have to agree on fixed texts: ids, what these decode to, special tokens, and the chat template.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_build.errors import VerificationError
from lora_build.files.formats.config_json import CONFIG_NAME
from lora_build.files.formats.side_files import is_tokenizer_file
from lora_build.files.identity import BASE
from lora_build.files.sources import Source, digest
from lora_build.models.architecture import FAULTS, quiet
from lora_build.proof.builds import BuildInputs
from lora_build.proof.forward.apart import ApartError, done_apart
from lora_build.proof.manifest import Manifest

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces, a\ttab\nand lines\n\n",
    "3.14159 + 2,718 = 5e0?",
    "Grüße, naïve café, Ἑλλάς, привет, 你好世界, こんにちは, مرحبا",
    "\U0001f469\u200d\U0001f680 \u00bd \u2460",
    "def f(x):\n    return x**2  # ok",
    "<s></s><|im_start|><|endoftext|>[CLS][MASK]",
)


def compare_tokenizers(directory: Path, manifest: Manifest, inputs: BuildInputs) -> str:
    """Return why the tokenizer of a build was not compared, an empty string where it was.

    Raises:
        VerificationError: it differs from that of the base or the adapter it comes from.
    """
    role, source = BASE, inputs.sources[BASE]
    mine = {file.path: file.sha256 for file in manifest.files if is_tokenizer_file(file.path)}
    for name, other in inputs.sources.items():
        if not name.is_base and mine and all(n in other.files and digest(other, n) == of for n, of in mine.items()):
            role, source = name, other
    names = [name for name in source.files if is_tokenizer_file(name)]
    if not names and not mine:
        return "there is no tokenizer to compare"
    theirs, why_not_theirs = _read(directory, source, names, role)
    ours, why_not_ours = _read(directory, None, (), "the build")
    if theirs is None and ours is None:
        return f"transformers loads neither the tokenizer of {role} nor the build's: {why_not_ours}"
    if theirs is None or ours is None:
        who, why = ("the build's", why_not_ours) if ours is None else (f"that of {role}", why_not_theirs)
        raise VerificationError(
            f"{directory}: of the tokenizers transformers does not load {who}, but the other: {why}"
        )
    if differences := list(_differences(theirs, ours)):
        raise VerificationError(
            f"{directory}: its tokenizer is not that of {role}: {'; '.join(differences)}; "
            "build again, or see which of its files differ"
        )
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a tokenizer makes of texts.

    Attributes:
        num_tokens: how many it has.
        special_tokens: by what they are for.
        ids: of each text.
        decoded: what these are as text again.
        chat_template: as it is written; it is not run, since it is a program.
    """

    num_tokens: int
    special_tokens: Mapping[str, Any]
    ids: list[list[int]]
    decoded: list[str]
    chat_template: Any


class NoTokenizerError(Exception):
    """transformers does not load a tokenizer, or it does not read a text."""


def read_texts(folder: Path, texts: Sequence[str]) -> Reading:
    """Return what the tokenizer in a folder makes of texts; it is asked in a process of its own.

    Raises:
        NoTokenizerError: transformers does not load it, or it does not read a text.
        ApartError: it takes too much time or memory, or ends its process.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # once, for all forks

    def read() -> dict[str, Any]:
        try:
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            ids = [found(text)["input_ids"] for text in texts]
        except FAULTS as error:
            return {"why": (str(error) or type(error).__name__).splitlines()[0]}
        special = {name: str(token) for name, token in found.special_tokens_map.items()}
        template, decoded = found.chat_template, [found.decode(of) for of in ids]
        return {
            "num_tokens": len(found), "special_tokens": special, "ids": ids, "decoded": decoded,
            "chat_template": template,
        }  # fmt: skip

    assert PreTrainedTokenizerFast is not None
    with quiet():
        answer = done_apart(read)
    if "why" in answer:
        raise NoTokenizerError(answer["why"])
    return Reading(**answer)


def _read(directory: Path, source: Source | None, names: Sequence[str], whose: str) -> tuple[Reading | None, str]:
    """Return what the tokenizer of a source's files, or of a build, makes of texts, or None and why it is not loaded.

    A source's files lie beside the build's config.json, by which transformers tells what kind they are of.
    """
    with tempfile.TemporaryDirectory(prefix="lora-build-") as scratch:
        folder = directory
        if source is not None:
            folder = Path(scratch)
            (folder / CONFIG_NAME).symlink_to((directory / CONFIG_NAME).resolve())
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to(source.path(name).resolve())
        try:
            return read_texts(folder, TEXTS), ""
        except NoTokenizerError as error:
            return None, str(error)
        except ApartError as error:
            raise VerificationError(
                f"{directory}: the tokenizer of {whose} cannot read a few lines of text: {error}; look at its files "
                "before you use it"
            ) from error


def _differences(theirs: Reading, ours: Reading) -> Iterator[str]:
    if theirs.num_tokens != ours.num_tokens:
        yield f"{ours.num_tokens} tokens in place of {theirs.num_tokens}"
    if theirs.special_tokens != ours.special_tokens:
        yield f"special tokens {ours.special_tokens} in place of {theirs.special_tokens}"
    for text, ids, found, back, other in zip(TEXTS, theirs.ids, ours.ids, theirs.decoded, ours.decoded, strict=True):
        if found != ids:
            yield f"{text!r} has ids {found[:8]} in place of {ids[:8]}"
            break
        if other != back:
            yield f"{ids[:8]} is {other!r} in place of {back!r}"
            break
    if theirs.chat_template != ours.chat_template:
        yield "it has another chat template"
