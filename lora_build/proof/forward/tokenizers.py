"""The tokenizer: whether a build reads and writes text as what it was made of.

The weights may be right and the answers nonsense: a build that lost a file of its tokenizer reads every word as
unknown. So the tokenizer of the base, or of the adapter whose files the build has, and that of the build are both
loaded and have to agree on fixed texts: ids, what these decode to, special tokens, and the chat template.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_build.errors import VerificationError
from lora_build.files.formats.config_json import CONFIG_NAME
from lora_build.files.formats.side_files import is_tokenizer_file
from lora_build.files.identity import BASE
from lora_build.files.sources import Source, digest
from lora_build.models.architecture import FAULTS, quiet
from lora_build.proof.builds import BuildInputs
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
    theirs, why_not_theirs = _load(directory, source, names)
    ours, why_not_ours = _load(directory, None, ())
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


def _load(directory: Path, source: Source | None, names: Sequence[str]) -> tuple[Any, str]:
    """Return the tokenizer of a source's files, or of a build, or None and why transformers does not load it.

    A source's files lie beside the build's config.json, by which transformers tells what kind they are of.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="lora-build-") as scratch:
        folder = directory
        if source is not None:
            folder = Path(scratch)
            (folder / CONFIG_NAME).symlink_to((directory / CONFIG_NAME).resolve())
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to(source.path(name).resolve())
        try:
            with quiet():
                return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False), ""
        except FAULTS as error:
            return None, (str(error) or type(error).__name__).splitlines()[0]


def _differences(theirs: Any, ours: Any) -> Iterator[str]:
    if len(theirs) != len(ours):
        yield f"{len(ours)} tokens in place of {len(theirs)}"
    if (a := theirs.special_tokens_map) != (b := ours.special_tokens_map):
        yield f"special tokens {b} in place of {a}"
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        if (found := ours(text)["input_ids"]) != ids:
            yield f"{text!r} has ids {found[:8]} in place of {ids[:8]}"
            break
        if (found := ours.decode(ids)) != (wanted := theirs.decode(ids)):
            yield f"{ids[:8]} is {found!r} in place of {wanted!r}"
            break
    if theirs.chat_template != ours.chat_template:  # not run: it is a program
        yield "it has another chat template"
