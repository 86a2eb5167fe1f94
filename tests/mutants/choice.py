"""The mutants of a package: its modules, each with one small fault, and which of them are tried.

    for mutant in chosen("planning"): ...   # mutant.source is the module's text with the fault

A mutant is named by module, function and what became what, not by lines, and whether it is tried hangs on a hash of that
name: an edit elsewhere leaves both alone.
"""

import ast
import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mutants.faults import Place, faults, places

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("planning", "proof", "files", "numerics")
SEED = "1"
NUM_TRIED = 100
"""Of each package."""

_LEAST_CHARACTERS = 12
"""Of what a name shows; less of it would not be found again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A module with a fault.

    Attributes:
        module: its dotted name.
        file: its path from the top.
        name: the module below the package, the function, what it says and what it says now.
        lines: where the fault is, first and last; those of a function where it is in its head; none where it is outside.
        tree: the module without it.
        place: what is made wrong.
        fault: what is there instead.
    """

    module: str
    file: str
    name: str
    lines: tuple[int, int] | None
    tree: ast.Module
    place: Place
    fault: ast.AST | None

    @property
    def rank(self) -> str:
        """What decides whether it is tried."""
        return hashlib.sha256(f"{SEED} {self.name}".encode()).hexdigest()

    @property
    def source(self) -> str:
        """The module's text, with the fault."""
        with _put(self.place, self.fault):
            return ast.unparse(self.tree)


def chosen(package: str) -> list[Mutant]:
    """Return the mutants of a package that are tried, equally many of each module that has enough of them."""
    of_modules = [sorted(of, key=lambda m: m.rank) for of in by_module(package)]
    found: list[Mutant] = []
    for round_ in range(NUM_TRIED):
        found += sorted((of[round_] for of in of_modules if round_ < len(of)), key=lambda m: m.rank)
    return sorted(found[:NUM_TRIED], key=lambda m: (m.module, m.lines or (0, 0), m.name))


def by_module(package: str) -> Iterator[list[Mutant]]:
    """Yield all mutants of each module of a package, tried or not."""
    for path in sorted((ROOT / "lora_build" / package).rglob("*.py")):
        yield list(mutants(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")))


def mutants(file: str, text: str) -> Iterator[Mutant]:
    """Yield a mutant for each place of a module that may be made wrong: one fault of each, which a hash chooses."""
    tree = ast.parse(text)
    module = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    seen: Counter[str] = Counter()
    for node, place, around in list(places(tree)):
        wrong = list(faults(node, place))
        if not wrong:
            continue
        shown = _shown(node, around)
        scope = ".".join([module.removeprefix("lora_build."), *(n.name for n in around if _is_named(n))])
        before = _text(shown)
        found = []
        for fault in wrong:
            with _put(place, fault):
                after = _text(fault if shown is node else shown) if fault or shown is not node else ""
            name = f"{scope}: {before} -> {after}".rstrip()
            if after == before:
                continue
            seen[name] += 1
            number = f" #{seen[name]}" if seen[name] > 1 else ""
            found.append(
                Mutant(
                    module=module, file=file, name=name + number, lines=_lines(node, around), tree=tree, place=place,
                    fault=fault,
                )
            )  # fmt: skip
        yield from sorted(found, key=lambda m: m.rank)[:1]


def _is_named(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef)


def _shown(node: ast.AST, around: tuple[ast.AST, ...]) -> ast.AST:
    """Return what a name shows: a node with as much around it as makes it known, at most its statement."""
    for outer in (node, *reversed(around)):
        if isinstance(outer, ast.stmt | ast.keyword) or (
            isinstance(outer, ast.expr) and len(ast.unparse(outer)) >= _LEAST_CHARACTERS
        ):
            return outer
    return node


def _text(node: ast.AST) -> str:
    """Return a node's text in one line; of a statement with others in it its head alone."""
    return ast.unparse(node).partition("\n")[0]


def _lines(node: ast.AST, around: tuple[ast.AST, ...]) -> tuple[int, int] | None:
    function = next((n for n in reversed(around) if isinstance(n, ast.FunctionDef)), None)
    if function is None:
        return None
    placed = next(n for n in (node, *reversed(around)) if hasattr(n, "lineno"))
    if any(isinstance(n, ast.arguments) for n in around) or isinstance(node, ast.arguments):
        return function.body[0].lineno, function.end_lineno
    if isinstance(placed, ast.stmt) and hasattr(placed, "body"):  # its head decides
        return placed.lineno, placed.body[0].lineno - 1 if placed.body[0].lineno > placed.lineno else placed.lineno
    return placed.lineno, placed.end_lineno


@contextmanager
def _put(place: Place, fault: ast.AST | None) -> Iterator[None]:
    """Have a fault in its place for as long as this goes on."""
    parent, field, index = place
    old = getattr(parent, field)
    new = fault
    if index is not None:
        left_out = [ast.Pass()] if isinstance(old[index], ast.stmt) else []
        new = [*old[:index], *(left_out if fault is None else [fault]), *old[index + 1 :]]
    setattr(parent, field, new)
    try:
        yield
    finally:
        setattr(parent, field, old)
