"""The tokenizers of two sides: their tokens, their special tokens, and their chat templates line by line."""

import difflib
from collections.abc import Iterator, Mapping

from lora_build.errors import SourceError
from lora_build.files.formats.tokenizer import Tokenizer, read_tokenizer
from lora_build.proof.comparing.compared import Compared
from lora_build.proof.comparing.result import Kind, TemplateDifference, TokenizerDifference

_MOST_LINES = 2_000  # of a template that is compared line by line
_MOST_CHARACTERS = 200_000
_KEPT_LINES = 200  # of a diff


def compare_tokenizers(before: Compared, after: Compared) -> TokenizerDifference | None:
    """Return what two tokenizers differ in, None where that is nothing that their files say here.

    Called where a file of theirs differs: a vocabulary may take a second to parse.
    """
    unread: list[str] = []
    was, now = _tokenizer(before, unread), _tokenizer(after, unread)
    if was is None or now is None:
        return TokenizerDifference(unread=tuple(unread)) if unread else None
    known = was.tokens is not None and now.tokens is not None
    old, new = (was.tokens or {}, now.tokens or {}) if known else ({}, {})
    if not known:
        unread += [f"{side.name}: its tokens are in a format that is not read here"
                   for side, found in ((before, was), (after, now)) if found.tokens is None]  # fmt: skip
    found = TokenizerDifference(
        added=_by_id({token: number for token, number in new.items() if token not in old}),
        removed=_by_id({token: number for token, number in old.items() if token not in new}),
        renumbered={
            token: (number, new[token]) for token, number in old.items() if token in new and new[token] != number
        },
        special_added=tuple(sorted(now.special - was.special)),
        special_removed=tuple(sorted(was.special - now.special)),
        eos=None if was.eos == now.eos else (was.eos, now.eos),
        templates=tuple(_templates(was.templates, now.templates)),
        unread=tuple(unread),
    )
    return None if found == TokenizerDifference() else found


def _tokenizer(side: Compared, unread: list[str]) -> Tokenizer | None:
    if side.source is None:
        return None
    try:
        return read_tokenizer(side.source)
    except SourceError as error:
        unread.append(str(error))
        return None


def _by_id(tokens: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(tokens.items(), key=lambda item: (item[1], item[0])))


def _templates(was: Mapping[str, str], now: Mapping[str, str]) -> Iterator[TemplateDifference]:
    for name in sorted(was.keys() | now.keys()):
        before, after = was.get(name), now.get(name)
        if before == after:
            continue
        kind: Kind = "added" if before is None else "removed" if after is None else "changed"
        lines = _unified(before or "", after or "")
        if lines is None:
            yield TemplateDifference(name=name, kind=kind)
        else:
            more = max(0, len(lines) - _KEPT_LINES)
            yield TemplateDifference(name=name, kind=kind, lines=tuple(lines[:_KEPT_LINES]), num_more=more)


def _unified(before: str, after: str) -> list[str] | None:
    """Return the lines of a unified diff without its head, None of texts that are too long for one."""
    was, now = before.split("\n"), after.split("\n")
    if len(was) + len(now) > _MOST_LINES or len(before) + len(after) > _MOST_CHARACTERS:
        return None
    return list(difflib.unified_diff(was, now, lineterm=""))[2:]
