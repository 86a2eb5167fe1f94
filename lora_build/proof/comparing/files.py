"""The files beside the weights of two sides: which differ, and in which keys where they are JSON as configs are."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lora_build.errors import SourceError, shortened
from lora_build.files.formats.json_object import MAX_CONFIG_BYTES, decode_json, parse_object
from lora_build.proof.comparing.compared import Compared
from lora_build.proof.comparing.result import FileDifference, FileFact, KeyDifference, Kind

_MOST_OF_A_VALUE = 300  # characters
_ALSO_BY_KEY = ("special_tokens_map.json", "adapter_config.json")
_TEMPLATE = ("chat_template",)  # a key whose value is compared line by line
_WHOLE = "added_tokens_decoder"  # a key whose entries, a token each, are values
_REWRITTEN = "its spaces or the order of its keys alone"


def compare_files(before: Compared, after: Compared) -> Iterator[FileDifference]:
    """Yield the files beside the weights that differ, by name.

    A file that holds weights on one side alone is said too: as a file of the other it may be anything.
    """
    for path in sorted(before.sizes.keys() | after.sizes.keys()):
        if path in before.weights and path in after.weights:
            continue
        is_weights = path in before.weights or path in after.weights
        # bytes are read where two sizes are one
        is_read = not is_weights and before.sizes.get(path) == after.sizes.get(path)
        was, now = _fact(before, path, is_read=is_read), _fact(after, path, is_read=is_read)
        kind = _kind(was, now)
        if kind is not None:
            yield FileDifference(path=path, kind=kind, before=was, after=now, is_weights=is_weights)


def _fact(side: Compared, path: str, *, is_read: bool) -> FileFact | None:
    if path not in side.sizes:
        return None
    known = side.digest_of(path) if is_read else side.file_digests.get(path)
    return FileFact(size_bytes=side.sizes[path], digest=known)


def _kind(was: FileFact | None, now: FileFact | None) -> Kind | None:
    if was is None or now is None:
        return "added" if was is None else "removed"
    if was.size_bytes != now.size_bytes:
        return "changed"
    if was.digest is None or now.digest is None:
        return "unknown"
    return None if was.digest == now.digest else "changed"


def compare_keys(before: Compared, after: Compared, path: str) -> tuple[tuple[KeyDifference, ...], str | None]:
    """Return the keys of a file of JSON that differ, and what else is known of its change.

    Nothing is known of a file that is no config, that is on one side alone, or whose text is not at hand.
    """
    last = path.rpartition("/")[2]
    if not (last.endswith("config.json") or last in _ALSO_BY_KEY):
        return (), None
    try:
        was, now = _object(before, path), _object(after, path)
    except SourceError as error:
        return (), str(error)
    if was is None or now is None:
        return (), None
    every = list(_differences(path, dict(_flat(was)), dict(_flat(now))))
    found = tuple(key for key in every if key.key not in _TEMPLATE)
    return found, None if every else _REWRITTEN


def _object(side: Compared, path: str) -> dict[str, Any] | None:
    """Return what a file says; None where its text is not at hand."""
    source = side.source
    if source is None or path not in source.files or path not in side.sizes:
        return None
    where, size = f"{side.name}/{path}:", source.files[path].size_bytes
    if size > MAX_CONFIG_BYTES:
        raise SourceError(f"{where} has {size} bytes, which are too many for a config")
    return parse_object(decode_json(source.read(path, 0, size), where), where)


def _differences(
    path: str, was: Mapping[tuple[str, ...], Any], now: Mapping[tuple[str, ...], Any]
) -> Iterator[KeyDifference]:
    for key in sorted(was.keys() | now.keys()):
        kind: Kind = "added" if key not in was else "removed" if key not in now else "changed"
        before, after = was.get(key), now.get(key)
        # as text: 1, 1.0 and true are three values for who reads JSON, and one for Python
        if kind != "changed" or _text(before) != _text(after):
            yield KeyDifference(
                file=path, key=".".join(key), kind=kind, before=_bounded(before), after=_bounded(after)
            )  # fmt: skip


def _flat(value: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each value with its keys from the top; an empty object is a value."""
    for key, item in value.items():
        if isinstance(item, dict) and item and above != (_WHOLE,):
            yield from _flat(item, (*above, key))
        else:
            yield (*above, key), item


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _bounded(value: Any) -> Any:
    """Return a value, or the ends of its text where that is long."""
    text = value if isinstance(value, str) else _text(value)
    return value if len(text) <= _MOST_OF_A_VALUE else shortened(text, _MOST_OF_A_VALUE)
