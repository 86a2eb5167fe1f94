"""What lies beside the weights of a base: what goes along, what stays behind and why.

Files at its root go along unless there is a reason against them. Of its folders goes along only what a file names:

    modules.json                the folders of sentence-transformers' modules, their own weights included
    auto_map, modules.json      code, and what it imports
    any other JSON              a file that it names by its whole path, such as a voice of Bark

and what transformers looks for by its name: chat templates, further tokenizers of a processor, a generate of its own.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lora_build.errors import SourceError
from lora_build.files.formats.adapter_config import CONFIG_NAME as ADAPTER_CONFIG_NAME
from lora_build.files.formats.adapter_config import WEIGHTS_NAME as ADAPTER_WEIGHTS_NAME
from lora_build.files.formats.code_files import code_of, named_code, texts, with_imports
from lora_build.files.formats.modules import parse_small, read_modules
from lora_build.files.formats.side_files import CODE, is_model_code, is_tokenizer_file, why_left_out
from lora_build.files.sources import LINKED, NO_FILE, Source, read_whole, sizes

_GENERATE = "custom_generate/generate.py"
_BY_NAME = re.compile(r"(additional_)?chat_templates/[\w.\-]+\.jinja|custom_generate/requirements\.txt")
_DECODER = ("alphabet.json", "language_model")  # pyctcdecode's: who loads the one looks for the other beside it
_FOLDER = "a folder that no file of the model names"
_IN_FOLDER = "in a folder, and no file of the model names it"
_LFS_POINTER = b"version https://git-lfs"
_ADAPTER_WEIGHTS = (ADAPTER_WEIGHTS_NAME, "adapter_model.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """The files beside the weights, each exactly once.

    Attributes:
        kept: those that go along, sorted.
        left_out: those that do not, with the reason; a folder of which nothing goes along is one entry, `onnx/`.
        notes: what a user should know of those that go along.
    """

    kept: tuple[str, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...] = ()


def look_beside_base(source: Source, used: Collection[str]) -> Beside:
    """Return what becomes of the files of a base other than its config and its weights.

    Raises:
        SourceError: modules.json names a folder outside of the base, a file that should go along cannot be read, or an
            adapter lies beside the weights.
    """
    _refuse_adapter(source)
    files = {name: size for name, size in sorted(sizes(source).items()) if name not in used}
    folders = sorted(name for name in files if "/" in name)
    modules = read_modules(source) if folders or any(name.endswith(".py") for name in files) else {}
    code = _code(source, files, modules)
    named = code | _named(source, folders, modules)
    reasons: dict[str, str] = {}
    for name, size in files.items():
        if "/" in name and name not in named:
            reasons[name] = _IN_FOLDER
        elif why := why_left_out(name, size, weights=_is_weights_of_module(name, files, modules)):
            reasons[name] = why
        elif name.endswith(".py") and name not in code and ("/" in name or not is_model_code(name)):
            reasons[name] = CODE
    kept = tuple(name for name in files if name not in reasons)
    pickled = [name for name in kept if name.endswith("/pytorch_model.bin")]
    _refuse_lost(source, kept, modules)
    notes = (f"base: {', '.join(pickled)}: pickled weights of a module go along unopened",) if pickled else ()
    return Beside(kept=kept, left_out=in_short(reasons, kept), notes=notes)


def in_short(reasons: Mapping[str, str], kept: Collection[str] = ()) -> dict[str, str]:
    """Return files left out by name, a folder of which nothing is kept as one, names as a terminal may show them."""
    alive = {name.partition("/")[0] for name in kept}
    found: dict[str, str] = {}
    inside: dict[str, set[str]] = {}
    for name, why in reasons.items():
        top, slash, _ = name.partition("/")
        whole = slash and top not in alive
        shown = f"{top}/" if whole else name
        if not shown.isprintable():
            shown = shown.encode("unicode_escape").decode()
        inside.setdefault(shown, set()).add(_FOLDER if whole and why == _IN_FOLDER else why)
        found[shown] = ", ".join(sorted(inside[shown]))
    return dict(sorted(found.items()))


def _refuse_adapter(source: Source) -> None:
    """Raise SourceError for an adapter beside the weights, which transformers applies to them when it loads a folder.

    `find_adapter_config_file` (transformers/utils/peft_utils.py): only where peft is installed.
    """
    found = [name for name in _ADAPTER_WEIGHTS if name in source.files]
    if found and ADAPTER_CONFIG_NAME in source.files:
        raise SourceError(
            f"{source.name}: holds an adapter beside its weights ({ADAPTER_CONFIG_NAME}, {', '.join(found)}), which "
            "transformers applies where peft is installed, so what the model is depends on who loads it; in a copy of "
            "the base, remove these files if its weights have them merged already, else move them to a folder of their "
            "own and add that to the recipe's adapters"
        )


def _refuse_lost(source: Source, kept: Collection[str], modules: Mapping[str, str]) -> None:
    """Raise SourceError for what should go along and is not there: links to nothing or to folders, pointers."""
    lost = {
        name: why for name, why in source.skipped.items()
        if (why == NO_FILE and any(path and name.startswith(f"{path}/") for path in modules))
        or (why == LINKED and (name.removesuffix("/") in modules or _BY_NAME.fullmatch(f"{name}x.jinja")))
    }  # fmt: skip
    pointers = (n for n in kept if 100 < sizes(source)[n] < 400 and read_whole(source, n).startswith(_LFS_POINTER))
    lost |= dict.fromkeys(pointers, "a pointer of Git LFS, not the file itself: run `git lfs pull`")
    if lost:
        found = ", ".join(f"{name!r} is {why}" for name, why in list(lost.items())[:4])
        raise SourceError(
            f"{source.name}: {found}; expected files that can be copied: "
            "fetch the model anew, or remove what it does not need"
        )


def _code(source: Source, files: Mapping[str, int], modules: Mapping[str, str]) -> frozenset[str]:
    """Return the files of code that any config or module names, and what they import."""
    if not any(name.endswith(".py") for name in files):
        return frozenset()
    configs = [name for name in sizes(source) if "/" not in name and re.fullmatch(r".*config.*\.json", name)]
    named = {file for name in sorted(configs) for file in named_code(dict(parse_small(source, name, dict)))}
    return with_imports(source, named | {file for kind in modules.values() for file in code_of(kind)} | {_GENERATE})


def _named(source: Source, folders: Collection[str], modules: Mapping[str, str]) -> frozenset[str]:
    """Return the files in folders that go along by the folder that they are in, or because a file names them."""
    tokenizers = {
        top for top, _, rest in (name.partition("/") for name in folders)
        if top.endswith("_tokenizer") and is_tokenizer_file(rest)
    }  # fmt: skip
    tops = tokenizers | {_DECODER[1]} if _DECODER[0] in source.files else tokenizers
    named = {name for name in folders if name.partition("/")[0] in tops or _BY_NAME.fullmatch(name)}
    named |= {name for name in folders if any(path and name.startswith(f"{path}/") for path in modules)}
    others = {name for name in folders if name not in named and why_left_out(name, 0) is None}
    if others:
        for name in sorted(sizes(source)):
            if name.endswith(".json") and "/" not in name and not is_tokenizer_file(name):
                named |= others.intersection(texts(parse_small(source, name, dict)))
    return frozenset(named)


def _is_weights_of_module(name: str, files: Collection[str], modules: Mapping[str, str]) -> bool:
    """Whether a file may be a module's own weights: of two formats it is the one that is no pickle."""
    if "/" not in name or not any(path and name.startswith(f"{path}/") for path in modules):
        return False
    folder, _, last = name.rpartition("/")
    return last != "pytorch_model.bin" or f"{folder}/model.safetensors" not in files
