"""Markdown of what may be anybody's text, for a comment on a pull request: nothing of it is read as Markdown or HTML.

    code("model.layers.*.mlp")     `model.layers.*.mlp`
    code("a|b`c")                  <code>a&#124;b&#96;c</code>

Names of tensors, tokens, templates and values of configs stand in code, where GitHub makes no link, no image and no
mention of them. https://github.github.com/gfm/
"""

import re
from collections.abc import Iterable, Sequence

from lora_build.terminal import escaped

_NOT_IN_BACKTICKS = re.compile(r"[`|\\]|^\s|\s$|^$")
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9 ]")


def code(text: str) -> str:
    """Return text as code in a line, which may be a cell of a table."""
    line = escaped(text)
    if _NOT_IN_BACKTICKS.search(line) is None:
        return f"`{line}`"
    # a bar ends a cell in backticks too, and a backslash before it does not mean one thing to all readers
    return f"<code>{_NOT_PLAIN.sub(lambda found: f'&#{ord(found[0])};', line)}</code>"


def fenced(lines: Iterable[str], language: str) -> list[str]:
    """Return lines as a block of code, whatever is in them."""
    shown = [escaped(line) for line in lines]
    longest = max((len(run) for line in shown for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *shown, fence]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table, its cells as they are: code, or words of our own."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]
