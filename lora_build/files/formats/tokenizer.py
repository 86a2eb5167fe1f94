"""Tokenizers as data: which files one has, and which tokens, special tokens, end of a text and templates they say.

Nothing is loaded: what decides whose tokenizer a model needs stands in JSON, and in lists of pieces. What is not known
of one (its tokens are in a format that is not read here, or it comes as code) is None.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_build.errors import SourceError
from lora_build.files.formats.code_files import named_code, with_imports
from lora_build.files.formats.side_files import is_tokenizer_file
from lora_build.files.identity import BASE, Digest, SourceName
from lora_build.files.sources import Source, read_whole

CONFIG_NAME = "tokenizer_config.json"
_WORDS_NAME = "tokenizer.json"
_ADDED_NAME = "added_tokens.json"
_SPECIAL_NAME = "special_tokens_map.json"
_TEMPLATE_NAME = "chat_template.jinja"
_NO_VOCABULARY = {CONFIG_NAME, _ADDED_NAME, _SPECIAL_NAME, _TEMPLATE_NAME, "chat_template.json"}
_LFS_POINTER = b"version https://git-lfs"
_MAX_BYTES = 100_000_000
_DECODER = "added_tokens_decoder"
_OLD_EXTRA = "additional_special_tokens"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """What the files of a tokenizer say.

    Attributes:
        files: its files, with the SHA-256 of each.
        code: the files of its own code, with the SHA-256 of each; of the base, those of its model too that an adapter's
            tokenizer has by the same name.
        tokens: the id of each token, without a vocabulary of those that it adds; None where nothing here reads them.
        special: the tokens that it has a name for or calls special.
        eos: the token that ends a text, None where it names none.
        templates: its chat templates by name.
    """

    files: Mapping[str, Digest]
    code: Mapping[str, Digest] = field(default_factory=dict)
    tokens: Mapping[str, int] | None = None
    special: frozenset[str] = frozenset()
    eos: str | None = None
    templates: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether it has a vocabulary: some adapters bring but the tokens that they added, or a template."""
        return _has_vocabulary(self.files)

    @property
    def eos_id(self) -> int | None:
        """The id of the token that ends a text."""
        return None if self.eos is None or self.tokens is None else self.tokens.get(self.eos)


def read_tokenizers(sources: Mapping[SourceName, Source], *, trains_rows: bool = False) -> dict[SourceName, Tokenizer]:
    """Return the tokenizers of a base and of the adapters that bring one; none where no adapter does.

    Where all are the same to the byte, only their files are said: a vocabulary may take a second to parse. But where an
    adapter names rows of tokens that it trained (`trains_rows`), all are parsed: these may be rows without a token.

    Raises:
        SourceError: a file of one is not what its name says.
    """
    names = {name: sorted(filter(is_tokenizer_file, source.files)) for name, source in sources.items()}
    names = {name: files for name, files in names.items() if files or name.is_base}
    if len(names) == 1 and not (trains_rows and names[BASE]):
        return {}
    for name, files in names.items():
        _refuse_long(sources[name], files)
    texts = {name: {file: read_whole(sources[name], file) for file in files} for name, files in names.items()}
    digests = {name: {file: Digest.sha256(text) for file, text in data.items()} for name, data in texts.items()}
    if not trains_rows and all(found == digests[BASE] for found in digests.values()):
        return {name: Tokenizer(files=found) for name, found in digests.items()}
    found = {name: _parse(sources[name], texts[name], digests[name]) for name in names}
    base = sources[BASE]
    twins = sorted({file for own in found.values() for file in own.code.keys() & base.files.keys()})
    return found | {BASE: replace(found[BASE], code={name: Digest.sha256(read_whole(base, name)) for name in twins})}


def read_tokenizer(source: Source) -> Tokenizer:
    """Return the tokenizer of one source, whichever of its files there are.

    Raises:
        SourceError: a file of it is not what its name says.
    """
    names = sorted(filter(is_tokenizer_file, source.files))
    _refuse_long(source, names)
    texts = {name: read_whole(source, name) for name in names}
    return _parse(source, texts, {name: Digest.sha256(text) for name, text in texts.items()})


def files_of_tokenizer(source: Source) -> tuple[str, ...]:
    """Return the files of the tokenizer that lies in a source, its own code included, sorted; vocabularies unread."""
    names = {*filter(is_tokenizer_file, source.files)}
    if CONFIG_NAME in names:
        _refuse_long(source, [CONFIG_NAME])
        config = _object(source, CONFIG_NAME, {CONFIG_NAME: read_whole(source, CONFIG_NAME)})
        names |= with_imports(source, set(named_code(config)))
    return tuple(sorted(names))


def _parse(source: Source, data: Mapping[str, bytes], digests: Mapping[str, Digest]) -> Tokenizer:
    for name, text in data.items():
        if text.startswith(_LFS_POINTER):
            raise SourceError(f"{source.name}/{name}: is a pointer of Git LFS, not the file itself; run `git lfs pull`")
    config, special = _object(source, CONFIG_NAME, data), _object(source, _SPECIAL_NAME, data)
    if isinstance(config.get(_DECODER), dict):
        special = {}  # transformers reads it only where the config names no added tokens
    named = {
        key: word for key, value in (config | special).items() if key.endswith("_token") and (word := _word(value))
    }
    further = list(_further(config, special))
    code = sorted(with_imports(source, set(named_code(config)))) if config else []
    _refuse_long(source, code)
    return Tokenizer(
        files=digests,
        code={name: Digest.sha256(read_whole(source, name)) for name in code},
        tokens=_all_tokens(source, data, config, (*_in_order(named), *further)),
        special=frozenset((*named.values(), *further)),
        eos=named.get("eos_token"),
        templates=_templates(config, data),
    )


def _refuse_long(source: Source, names: Iterable[str]) -> None:
    """Raise SourceError if a file is longer than any of a tokenizer, before it is read."""
    for name in names:
        if (size := source.files[name].size_bytes) > _MAX_BYTES:
            raise SourceError(f"{source.name}/{name}: {size} bytes are too many for a file of a tokenizer")


def _further(config: Mapping[str, Any], special: Mapping[str, Any]) -> Iterator[str]:
    """Yield the special tokens without a name of their own, in transformers' order; old keys give way to new ones."""
    lists = [part.get(key) or () for part in (config, special) for key in ("extra_special_tokens", _OLD_EXTRA)]
    first, old, more, older = lists
    yield from _words(first or old)
    yield from _words(more if more or first or old else older)


def _in_order(named: Mapping[str, str]) -> list[str]:
    """Return special tokens with a name in the order in which transformers adds those that are none yet."""
    return [named[key] for key in sorted(named, key=lambda key: _NAMED.index(key) if key in _NAMED else len(_NAMED))]


def _has_vocabulary(files: Collection[str]) -> bool:
    return any("/" not in name and name not in _NO_VOCABULARY for name in files)


def _tokens(source: Source, data: Mapping[str, bytes]) -> tuple[Mapping[str, int] | None, Sequence[str]]:
    """Return the tokens of the vocabulary, None if no format is known, and those that tokenizer.json adds to it."""
    if _WORDS_NAME in data:
        return _of_tokenizer_json(_object(source, _WORDS_NAME, data))
    if "vocab.json" in data:
        found = _object(source, "vocab.json", data)
        return found if all(type(number) is int for number in found.values()) else None, ()
    if "vocab.txt" in data:
        words = data["vocab.txt"].decode(errors="replace").split("\n")
        return {word.rstrip("\r"): place for place, word in enumerate(words) if word}, ()
    models = [name for name in data if name.endswith(".model")]
    if len(models) != 1:
        return None, ()
    try:
        return {piece: place for place, piece in enumerate(_pieces(data[models[0]]))} or None, ()
    except (IndexError, ValueError):
        return None, ()


def _of_tokenizer_json(found: Mapping[str, Any]) -> tuple[Mapping[str, int] | None, Sequence[str]]:
    model = found.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    match words:
        case dict():
            tokens = {word: number for word, number in words.items() if type(number) is int}
        case list():  # of a unigram model: [word, score]
            tokens = {str(pair[0]): place for place, pair in enumerate(words) if isinstance(pair, list) and pair}
        case _:
            return None, ()
    entries = found.get("added_tokens")
    added = entries if isinstance(entries, list) else []
    return tokens, [word for entry in added if isinstance(entry, dict) and (word := _word(entry)) is not None]


def _all_tokens(
    source: Source, data: Mapping[str, bytes], config: Mapping[str, Any], special: Sequence[str]
) -> dict[str, int] | None:
    """Return all tokens with the numbers that they have once transformers has loaded them.

    Special tokens that are none yet are added behind all others; where a vocabulary is not known, nobody can count.
    """
    added = _added(source, config, data)
    if not _has_vocabulary(data):
        return added
    tokens, own = _tokens(source, data)
    if not tokens:
        return None
    # a tokenizer.json numbers what is added to it anew, whatever number a file gives that
    stated = [(word, None if _WORDS_NAME in data else n) for word, n in sorted(added.items(), key=lambda item: item[1])]
    return _with_added(tokens, [*((word, None) for word in own), *stated, *((word, None) for word in special)])


def _with_added(tokens: Mapping[str, int], added: Iterable[tuple[str, int | None]]) -> dict[str, int]:
    """Return tokens and those added to them: at a number of their own, or at the next one.

    That is the number of tokens, or the one behind the last added: tokenizers' added_vocabulary.rs, add_tokens.
    """
    found, last = dict(tokens), len(tokens) - 1
    for word, number in added:
        if word:
            last = max(last, found.setdefault(word, last + 1 if number is None else number))
    return found


def _added(source: Source, config: Mapping[str, Any], data: Mapping[str, bytes]) -> dict[str, int]:
    """Return the tokens that other files add to the vocabulary; those of the config hide the older file's."""
    decoder = config.get(_DECODER)
    if not isinstance(decoder, dict):
        return {word: n for word, n in _object(source, _ADDED_NAME, data).items() if type(n) is int}
    return {
        word: int(number)
        for number, entry in decoder.items()
        if (word := _word(entry)) is not None and number.isascii() and number.isdecimal() and len(number) < 10
    }


def _templates(config: Mapping[str, Any], data: Mapping[str, bytes]) -> dict[str, str]:
    """Return the chat templates; a file wins over tokenizer_config.json, as in transformers."""
    written, found = config.get("chat_template"), {}
    if isinstance(written, str):
        found["default"] = written
    for entry in written if isinstance(written, list) else ():
        if isinstance(entry, dict):
            found[str(entry.get("name"))] = str(entry.get("template"))
    for name, text in data.items():
        folder, _, last = name.rpartition("/")
        if folder:
            found[last.removesuffix(".jinja")] = text.decode(errors="replace")
    if _TEMPLATE_NAME in data:
        found["default"] = data[_TEMPLATE_NAME].decode(errors="replace")
    return found


def _object(source: Source, name: str, data: Mapping[str, bytes]) -> dict[str, Any]:
    """Return a JSON object among the files; an empty one where it is not there."""
    if name not in data:
        return {}
    try:
        found = json.loads(data[name])
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{source.name}/{name}: is not JSON ({error}); save the tokenizer anew") from error
    return found if isinstance(found, dict) else {}


def _word(value: Any) -> str | None:
    """Return a token that is written as text, or as an object with its `content`."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def _words(value: Any) -> Iterator[str]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    yield from (word for word in map(_word, values) if word is not None)


def _pieces(model: bytes) -> Iterator[str]:
    """Yield the pieces of a sentencepiece model, in the order of their ids.

    sentencepiece_model.proto: a ModelProto has its pieces as field 1, and each of these its text as field 1.
    """
    at = 0
    while at < len(model):
        tag, at = _varint(model, at)
        if tag != 0x0A:
            at = _skip(model, tag, at)
            continue
        size, at = _varint(model, at)
        start, at = at, at + size
        if model[start] != 0x0A:
            raise ValueError("a piece begins with its text")
        length, start = _varint(model, start + 1)
        yield model[start : start + length].decode(errors="replace")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("no number is so long")


def _skip(data: bytes, tag: int, at: int) -> int:
    match tag & 7:
        case 0:
            return _varint(data, at)[1]
        case 1:
            return at + 8
        case 2:
            size, at = _varint(data, at)
            return at + size
        case 5:
            return at + 4
        case _:
            raise ValueError("no such field")
