"""How what is said looks on a terminal: the word in colour, lines wrapped between words, tables fitted to the width.

The one place that knows of styles and of rich, imported only where something is styled or fitted. Which stream takes
colours, rich knows: NO_COLOR, FORCE_COLOR, TTY_COMPATIBLE and TERM decide as everywhere. Text is escaped
before anything is done to it, and rich gets it as text, never as markup.
"""

import io
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO, assert_never

from lora_build.cli.lines import INDENT, Column, Kind, Line, Said, Table, aligned, begin_of
from lora_build.terminal import escaped

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_GOOD, _BAD, _WARNING, _NOTE, _HEAD, _ASIDE = "bold green", "bold red", "bold yellow", "bold cyan", "bold", "dim"
_STYLES = {
    **dict.fromkeys(("built", "ok", "up to date", "create", "wrote", "equal"), _GOOD),
    **dict.fromkeys(("error", "failed", "problem", "too far"), _BAD),
    **dict.fromkeys(("warning", "replaced", "replace", "perhaps up to date", "untrained", "not taken"), _WARNING),
    **dict.fromkeys(("different", "not known"), _WARNING),
    "note": _NOTE,
    "same as": _ASIDE,
}
_HASH = re.compile(r"\bsha256:([0-9a-f]{12})[0-9a-f]{52}\b")
_COMMAND = re.compile(r"(?:^|(?<=[:?] ))lora-build .*$")
_COPIED = "manifest"  # the line whose hash people copy
_SHORTEST_PATH, _END_OF_PATH = 20, 12  # a sweep's folders end with so many digits of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How a stream wants things to look.

    Attributes:
        console: what text with styles is turned into; it knows which colours the stream takes.
        width: the columns of a terminal; None where there is none: nothing is wrapped or cut then.
    """

    console: "Console"
    width: int | None


def look_of(stream: TextIO) -> Look:
    """Return how a stream wants things to look."""
    from rich.console import Console

    asked = Console(file=stream)
    console = Console(
        file=io.StringIO(), force_terminal=True, legacy_windows=False, width=asked.width, _environ={},
        # who asks for no colour gets nothing bold or dim either: rich would leave that
        color_system=None if asked.no_color else asked.color_system,  # type: ignore[arg-type]  # a name of one
    )  # fmt: skip
    return Look(console=console, width=asked.width if stream.isatty() else None)


def styled(things: Iterable[Said], look: Look) -> str:
    """Return things as a stream is to get them."""
    return _written((line for said in things for line in _lines(said, look)), look)


def styled_message(word: str, lines: Sequence[str], look: Look) -> str:
    """Return a message: its first line behind a word, the others below it."""
    texts = []
    for number, line in enumerate(map(escaped, lines)):
        begin, indent = ([("  ", "")], 4) if number else ([(f"{word}:", _style(word)), (" ", "")], 2)
        texts += list(_wrapped(_text(*begin), [(line, "")], indent, look.width))
    return _written(texts, look)


def _lines(said: Said, look: Look) -> "Iterator[Text]":
    match said:
        case str():
            yield from _wrapped(_text(), [(escaped(said), "")], 4, look.width)
        case Line(word, text, aside):
            begin = _text((f"{escaped(word):<{INDENT - 1}}", _style(word)), (" ", ""))
            shown = [text if word == _COPIED else _cut(text, look.width), _cut(aside, look.width)]
            parts = [(escaped(part), style) for part, style in zip(shown, ("", _ASIDE), strict=True) if part]
            yield from _wrapped(begin, parts, INDENT, look.width)
        case Table():
            yield from _unbounded(said) if look.width is None else _fitted(said, look, look.width)
        case _:
            assert_never(said)


def _wrapped(begin: "Text", parts: Sequence[tuple[str, str]], indent: int, width: int | None) -> "Iterator[Text]":
    """Yield a line, broken between words where there is no room; the parts of it, each with a style, stand apart.

    A word is never broken, nor a command that ends a line: whoever copies a path, a hash or a command gets the whole.
    What is long begins further to the left; what is longer than a line, a terminal breaks, which does no copy harm.
    """
    from rich.cells import cell_len

    room, line, is_fresh = width or 1 << 30, begin, True
    for gap, word, style in _words(parts):
        length = cell_len(word)
        if is_fresh and line.cell_len + length > room:  # behind the word that it begins with
            line.rstrip()
            line.append(" " if line.plain else "")
        if line.cell_len + len(gap) + length > room and not (is_fresh and length > room) and line.plain.strip():
            yield line
            line, gap = _text((" " * (indent if length > room else min(indent, room - length)), "")), ""
        line.append(gap + word, style)
        is_fresh = False
    yield line


def _words(parts: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Yield each word of some parts, with what stands before it on the same line, and its style."""
    for number, (text, style) in enumerate(parts):
        command = _COMMAND.search(text)
        words = [*text[: command.start()].split(" ")[:-1], command[0]] if command else text.split(" ")
        for position, word in enumerate(words):
            yield (" " if position else "  " if number else ""), word, style


def _unbounded(table: Table) -> "Iterator[Text]":
    """Yield a table as text has it, with its outcomes in their styles."""
    with_heads = any(column.head for column in table.shown)
    for number, row in enumerate(aligned(table)):
        line = _text((begin_of(table), ""))
        for place, (column, cell) in enumerate(zip(table.shown, row, strict=True)):
            is_head = with_heads and number == 0
            style = _HEAD if is_head else _style(cell.rstrip()) if column.kind is Kind.word else ""
            line.append("  " if place else "").append(cell, style)
        line.rstrip()
        yield line


def _fitted(table: Table, look: Look, width: int) -> "Iterator[Text]":
    """Yield a table that is no wider than a terminal: its heads give way first, then a path, then text is wrapped."""
    from rich.table import Table as RichTable
    from rich.text import Text

    room, shown = width - table.indent, list(table.shown)
    while True:
        heads, columns = _in_room(shown, room, width)
        spare = sorted((column for column in shown if column.spare), key=lambda column: column.spare)
        if not spare or _over(heads, columns, room) <= 0:
            break
        shown.remove(spare[0])
    grid = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(heads))
    for head, column in zip(heads, shown, strict=True):
        grid.add_column(Text(head, _HEAD), overflow="fold", no_wrap=column.kind is not Kind.text)
    for row in zip(*columns, strict=True):
        styles = [_style(cell) if c.kind is Kind.word else "" for c, cell in zip(shown, row, strict=True)]
        grid.add_row(*map(Text, row, styles))
    for number, segments in enumerate(look.console.render_lines(grid, look.console.options.update(width=room))):
        line = _text((begin_of(table) if number == 0 else " " * table.indent, ""))
        for segment in segments:
            line.append(segment.text, segment.style)
        line.rstrip()
        yield line


def _in_room(shown: Sequence[Column], room: int, width: int) -> tuple[list[str], list[list[str]]]:
    """Return heads and cells that take no more room than there is, if heads of several lines and short paths can do."""
    columns = [[_cut(escaped(cell), width) for cell in column.cells] for column in shown]
    heads: list[str] = []
    for num_lines in (1, 2, 3):
        heads = [_stacked(escaped(c.head), cells, num_lines) for c, cells in zip(shown, columns, strict=True)]
        if _over(heads, columns, room) <= 0:
            break
    if (over := _over(heads, columns, room)) > 0:
        columns = [
            [_shortened(cell, max(map(len, cells)) - over) for cell in cells] if column.kind is Kind.path else cells
            for column, cells in zip(shown, columns, strict=True)
        ]
    return heads, columns


def _over(heads: Sequence[str], columns: Sequence[Sequence[str]], room: int) -> int:
    """Return by how much columns are wider than their room, each two apart from the next."""
    from rich.cells import cell_len

    widths = [max(map(cell_len, (*head.split("\n"), *cells))) for head, cells in zip(heads, columns, strict=True)]
    return sum(widths) + 2 * (len(widths) - 1) - room


def _stacked(head: str, cells: Sequence[str], num_lines: int) -> str:
    """Return a head in about so many lines, if it is wider than its cells and has several words."""
    width = max(-(-(len(head) + num_lines - 1) // num_lines), *map(len, cells))
    return "\n".join(textwrap.wrap(head, width, break_long_words=False, break_on_hyphens=False))


def _shortened(path: str, room: int) -> str:
    """Return a path with a star in place of its middle where it is too long; a shell finds the folder by that."""
    room = max(room, _SHORTEST_PATH)
    return path if len(path) <= room else f"{path[: room - _END_OF_PATH - 1]}*{path[-_END_OF_PATH:]}"


def _cut(text: str, width: int | None) -> str:
    """Return text with twelve digits of each hash, where a terminal shows it."""
    return text if width is None else _HASH.sub(r"\1", text)


def _style(words: str) -> str:
    """Return the style of a word, which more may follow: `failed (2)`; a word that only names what follows has none."""
    return next((style for word, style in _STYLES.items() if f"{words} ".startswith(f"{word} ")), "")


def _text(*parts: tuple[str, str]) -> "Text":
    from rich.text import Text

    return Text.assemble(*parts)


def _written(lines: "Iterable[Text]", look: Look) -> str:
    with look.console.capture() as captured:
        for line in lines:
            look.console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)
    return captured.get()
