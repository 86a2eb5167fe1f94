"""What people put into the folder of a build: a README, a signature, scores. It may stay, and a new build keeps it.

Not so what a loader would read in place of the build's own files, or besides them: weights, configs, tokenizers, chat
templates and code at the top of the folder, the folders that loaders look for by their name, and those that the build
has files in, since some file of it names these. A symbolic link may stay, but no check can tell what is behind it.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from lora_build.errors import some_of
from lora_build.files.formats.side_files import is_tokenizer_file
from lora_build.files.targets.disk import disk_errors

_READ_BY_LOADERS = re.compile(
    r"""
    [^/]*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|npz|index\.json|py|jinja|model|tiktoken|codes|spm)
    | ((adapter|generation|tokenizer|\w*processor|quant\w*|hf_quant|sentence_\w+)_)?config\.json
    | (decision|judge|router|cnn|lstm|\w*embedding)_config\.json | decision\.json | calibration\.json
    | config_sentence_transformers\.json | speaker_embeddings\w*\.json | alphabet\.json | idf\.json
    | (params|modules|special_tokens_map)\.json
    | [^/]*(tokenizer|vocab|merges|chat_template|processor)[^/]*\.(json|txt|bpe) | dict\..*
    | ((additional_)?chat_templates | custom_generate | language_model | \w+_tokenizer | [0-9]+_[A-Z][A-Za-z]*)(/.*)?
    """,
    re.VERBOSE | re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Additions:
    """What is in a build's folder besides its own files, sorted; a folder stands for itself only if it is empty.

    Attributes:
        harmless: what may be there.
        links: symbolic links that no loader reads.
        read_by_loaders: what changes what is loaded, or may.
    """

    harmless: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    read_by_loaders: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(sorted((*self.harmless, *self.links, *self.read_by_loaders)))


def refusal(where: str, additions: Additions) -> str | None:
    """Return why a build is not used as it is: something lies beside its files that may change what is loaded."""
    if not (names := additions.read_by_loaders):
        return None
    return (
        f"{where} holds files that lora-build did not write ({some_of(names)}), and that a loader may read; move them "
        "away"
    )


def find_additions(root: Path, own: Mapping[str, object] | frozenset[str]) -> Additions:
    """Return what is below a build besides its own files; no link is followed."""
    with disk_errors(root):
        found = sorted(path for path in _walk(root) if path not in own)
        links = {name for name in found if (root / name).is_symlink()}
    return sort_additions(found, own, links)


def sort_additions(
    names: Iterable[str], own: Mapping[str, object] | frozenset[str], links: Set[str] = frozenset()
) -> Additions:
    """Return what lies beside a build's own files by what it is, given its names, and which of them are links."""
    found = sorted(names)
    named = {name.partition("/")[0] for name in own if "/" in name}
    read = {name for name in found if _is_read(name) or name.partition("/")[0] in named}
    return Additions(
        harmless=tuple(name for name in found if name not in read and name not in links),
        links=tuple(name for name in found if name in links and name not in read),
        read_by_loaders=tuple(sorted(read)),
    )


def _is_read(name: str) -> bool:
    return bool(_READ_BY_LOADERS.fullmatch(name)) or is_tokenizer_file(name)


def _walk(root: Path) -> Iterator[str]:
    """Yield everything below a folder that is no folder with something in it, as paths relative to the top."""
    waiting = [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(root / below) as entries:
            found = [(f"{below}/{entry.name}".lstrip("/"), entry.is_dir(follow_symlinks=False)) for entry in entries]
        if below and not found:
            yield below
        waiting += [path for path, is_folder in found if is_folder]
        yield from (path for path, is_folder in found if not is_folder)
