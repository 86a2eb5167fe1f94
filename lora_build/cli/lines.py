"""What is said, apart from how it looks: lines that begin with a word, and tables. Here as text, as a pipe gets it.

    built     builds/demo  2.03 MB in 0.8 s          Line("built", "builds/demo", "2.03 MB in 0.8 s")
    forward   prompt           tokens  KL            Table of three columns, word "forward"
    forward   seed, 5 tokens   5       2e-06

A row is a line, however long, and names and hashes are whole: what reads a pipe cuts and counts by itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from lora_build.terminal import escaped

INDENT = 10  # where what is said begins, behind a word and a space


class Line(NamedTuple):
    """A word that says what kind of line it is, what is said, and what is said aside."""

    word: str
    text: str
    aside: str = ""


class Kind(Enum):
    """What the cells of a column are; a terminal shows each in its way."""

    text = "text"
    word = "word"  # or a hash: nothing that is wrapped
    path = "path"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column.

    Attributes:
        cells: from above.
        head: what stands above them, if anything.
        kind: what they are.
        spare: how soon a terminal without room for it leaves it out: 1 first; 0 never.
    """

    cells: Sequence[str]
    head: str = ""
    kind: Kind = Kind.text
    spare: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Columns of equal length; one that is empty everywhere is not shown.

    Attributes:
        columns: from left to right.
        word: what kind of lines these are; a terminal shows it once.
        indent: where the first column begins.
    """

    columns: Sequence[Column]
    word: str = ""
    indent: int = INDENT

    @property
    def shown(self) -> list[Column]:
        """The columns that have something to show."""
        return [column for column in self.columns if any(column.cells)]


Said = str | Line | Table


def plain(said: Said) -> Iterator[str]:
    """Yield lines as text, each escaped on its own, so that no name breaks one."""
    match said:
        case str():
            yield escaped(said)
        case Line(word, text, aside):
            yield escaped(f"{word:<{INDENT - 1}} {text}" + (f"  {aside}" if aside else "")).rstrip()
        case Table():
            yield from (f"{begin_of(said)}{'  '.join(row)}".rstrip() for row in aligned(said))


def begin_of(table: Table) -> str:
    """Return what stands before the rows of a table."""
    return escaped(f"{table.word:<{table.indent - 1}} ") if table.indent else ""


def aligned(table: Table) -> list[tuple[str, ...]]:
    """Return the rows of a table, its heads first where it has any: cells that are as wide as their column."""
    with_heads = any(column.head for column in table.shown)
    columns = [[escaped(cell) for cell in (column.head, *column.cells)][not with_heads :] for column in table.shown]
    return list(zip(*([cell.ljust(max(map(len, cells))) for cell in cells] for cells in columns), strict=True))
