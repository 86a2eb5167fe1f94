"""What goes along beside the output's weights, and what of all inputs does not: each of their files exactly once."""

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lora_build.files.formats.beside_base import in_short
from lora_build.files.formats.checkpoint import GENERATION_CONFIG_NAME
from lora_build.files.formats.side_files import is_tokenizer_file
from lora_build.files.identity import BASE, SourceName
from lora_build.planning.inputs import Inputs
from lora_build.planning.tokenizer import TokenizerChoice

_NOT_USED = "of a tokenizer that is not used"


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFiles:
    """The files that are no weights.

    Attributes:
        files: those that go along unchanged, each with its source, sorted.
        of_adapters: those of each adapter that do.
        left_out: by source those that do not, with the reason.
        issues: what is wrong.
    """

    files: Mapping[str, SourceName]
    of_adapters: Mapping[SourceName, tuple[str, ...]]
    left_out: Mapping[SourceName, Mapping[str, str]]
    issues: tuple[str, ...]


def what_goes_along(inputs: Inputs, tokenizer: TokenizerChoice) -> SideFiles:
    """Return what becomes of the files beside the weights; a tokenizer comes from one source as a whole."""
    base, users = inputs.base, tokenizer.users
    replaced = [name for name in base.side_files if users and (is_tokenizer_file(name) or name in tokenizer.files)]
    kept = {name: BASE for name in base.side_files if name not in replaced}
    if tokenizer.generation is not None:
        del kept[GENERATION_CONFIG_NAME]
    files = dict(sorted((kept | (dict.fromkeys(tokenizer.files, users[0]) if users else {})).items()))
    used = dict.fromkeys(users, tokenizer.files)
    left_out = {BASE: dict(sorted({**base.left_out, **dict.fromkeys(replaced, _NOT_USED)}.items()))}
    for adapter in inputs.adapters:
        mine = used.get(adapter.source, ())
        left_out[adapter.source] = in_short({n: why for n, why in adapter.others.items() if n not in mine}, mine)
    return SideFiles(files=files, of_adapters=used, left_out=left_out, issues=tuple(_twins(inputs, files)))


def _twins(inputs: Inputs, files: Mapping[str, SourceName]) -> Iterator[str]:
    """Yield the files that other file systems than this one take for one."""
    seen: dict[str, str] = {}
    for name in sorted({*files, *inputs.base.shards, "config.json"}):
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            yield (
                f"base: {other!r} and {name!r} are one file where case or accents do not count; expected names that "
                "stay apart everywhere: remove the one that the model needs not"
            )
