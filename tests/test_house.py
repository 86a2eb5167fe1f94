"""The rules of the house (docs/contributing.md): which room may use which, and what every room looks like."""

import ast
import functools
import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_build

PACKAGE = Path(lora_build.__file__).parent
# from the bottom; a package imports only from packages in rows above its own
FLOORS = (
    ("terminal",),
    ("_native", "errors", "_version", "dtypes", "grading", "interrupts"),
    ("recipe", "files", "numerics"),
    ("methods", "models"),
    ("planning",),
    ("engine",),
    ("wrapper",),
    ("proof",),
    ("scores",),
    ("pipeline",),
    ("pages",),
    ("keeping", "start"),
    ("sweep",),
    ("cli",),
    ("__main__",),
)
ONLY = {
    "hydra": ("cli", "recipe"),
    "torch": ("wrapper", "proof.forward", "engine.backends"),  # where it is imported at once
    "transformers": (),  # nowhere at once
    "peft": (),
}
ANYWHERE = ("hydra", "peft")  # for these, an import within a function counts too
MOST_LINES, MOST_LINES_OF_A_CLASS, MOST_LINES_OF_A_FUNCTION, MOST_PARAMETERS = 350, 200, 55, 5
ASKED_AS_ON_THE_COMMAND_LINE = {"proof.verify.verify"}
OLD_WORDS = {
    "lane", "lanes", "draft", "drafts", "knot", "knots", "origin", "worn", "wear", "attached", "stray", "strays",
    "stranger", "strangers", "arithmetic", "sink", "sinks",
}  # fmt: skip
OLD_NAMES = (
    "Pool", "Lane", "Clock", "Draft", "Knots", "Origin", "Attached", "DirectorySink", "Built", "Prepared", "Verified",
    "peft_layers", "tying[.]py", "live[.]py",
)  # fmt: skip


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Return every module of the package by its name below it, without the package's own face."""
    found = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}
    return {n.removesuffix(".__init__"): ast.parse(p.read_text()) for n, p in found.items() if n != "__init__"}


def imports(tree: ast.AST, *, at_once: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of what is imported, those for type checkers left out; only the module's level if `at_once`."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.FunctionDef() if at_once:
                continue
            case ast.Import(names=names):
                yield from ((alias.name, "") for alias in names)
            case ast.ImportFrom(module=str(module), names=names):
                yield from ((module, alias.name) for alias in names)
        yield from imports(node, at_once=at_once)


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_stands_in_a_room_that_the_plan_knows() -> None:
    assert {room(name) for name in modules()} <= {name for floor in FLOORS for name in floor}


def test_a_room_uses_only_rooms_below_it() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = []
    for name, tree in modules().items():
        for module, what in imports(tree):
            if module == "lora_build" and what not in floor:
                continue  # the face: the version
            if room(module) != "lora_build":
                continue
            other = room(f"{module}.{what}".removeprefix("lora_build."))
            if other != room(name) and floor[other] >= floor[room(name)]:
                wrong.append(f"{name} imports {module}.{what}")
    assert wrong == []


def test_no_two_modules_need_each_other_not_even_within_functions() -> None:
    needs = {
        name: {
            other
            for module, what in imports(tree)
            for other in (module.removeprefix("lora_build."), f"{module}.{what}".removeprefix("lora_build."))
            if other in modules() and other != name
        }
        for name, tree in modules().items()
    }
    while free := {name for name, others in needs.items() if not others}:
        needs = {name: others - free for name, others in needs.items() if name not in free}
    assert needs == {}


def test_no_room_uses_the_private_names_of_another() -> None:
    wrong = [
        f"{name} imports {module}.{what}"
        for name, tree in modules().items()
        for module, what in imports(tree)
        if module.startswith("lora_build.")
        and room(module.removeprefix("lora_build.")) != room(name)
        and any(part.startswith("_") for part in (*module.split(".")[2:], what))
    ]
    assert wrong == []


@pytest.mark.parametrize("library", ONLY)
def test_a_library_is_imported_only_where_the_plan_says(library: str) -> None:
    users = {
        name
        for name, tree in modules().items()
        if any(room(module) == library for module, _ in imports(tree, at_once=library not in ANYWHERE))
    }
    allowed = ONLY[library]
    assert [name for name in sorted(users) if not name.startswith(allowed)] == [] if allowed else users == set()


def test_an_error_is_given_its_lines_one_by_one() -> None:
    """A name with a line break would be a line of the message too."""
    wrong = [p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if '"\\n  ".join' in p.read_text()]
    assert sorted(wrong) == ["cli/main.py", "cli/output.py", "errors.py"]


def test_each_room_says_what_it_is_for() -> None:
    rooms = [name for name in modules() if (PACKAGE / name.replace(".", "/")).is_dir()]
    assert len(rooms) >= 10
    assert [name for name in rooms if not ast.get_docstring(modules()[name])] == []


def test_no_room_bears_the_name_of_a_public_function() -> None:
    for found in pkgutil.walk_packages(lora_build.__path__, "lora_build."):
        if not found.name.endswith(("__main__", ".library")):  # the compiled loops are no module
            importlib.import_module(found.name)
    said = {}
    for name in {*lora_build.__all__} - {"__version__"}:
        try:
            getattr(lora_build, name)()
        except lora_build.RecipeError:  # of `init`, which takes either of two things
            said[name] = "missing"
        except TypeError as error:  # that it wants to be told more; a module cannot be called at all
            said[name] = str(error)
    assert {"build", "init", "inspect", "load_recipe", "merge", "plan", "verify"} <= said.keys()
    assert {name: text for name, text in said.items() if "missing" not in text} == {}


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def num_lines(node: ast.ClassDef | ast.FunctionDef) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


def parameters(function: ast.FunctionDef) -> list[str]:
    """Return the names of a function's parameters but `self`."""
    arguments = function.args
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def test_no_module_is_so_long_that_nobody_reads_it() -> None:
    lines = {p.relative_to(PACKAGE).as_posix(): len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert len(lines) >= 150
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_no_class_is_so_long_that_nobody_reads_it() -> None:
    classes = [
        (f"{name}.{node.name}", num_lines(node))
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    assert len(classes) >= 150
    assert [found for found in classes if found[1] > MOST_LINES_OF_A_CLASS] == []


def test_no_function_is_long_or_takes_more_than_one_can_remember() -> None:
    found = [(f"{name}.{node.name}", node) for name, tree in modules().items() for node in functions(tree)]
    assert len(found) >= 1000
    assert [name for name, node in found if num_lines(node) > MOST_LINES_OF_A_FUNCTION] == []
    assert {name for name, node in found if len(parameters(node)) > MOST_PARAMETERS} <= ASKED_AS_ON_THE_COMMAND_LINE


def test_a_class_has_a_name_of_its_own() -> None:
    names = Counter(
        node.name
        for tree in modules().values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def identifiers(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module makes or uses, but for those of attributes."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.alias(name=name):
                yield from name.split(".")
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name


def test_no_old_word_is_left() -> None:
    found = set()
    for name, tree in modules().items():
        parts = (part for word in (*name.split("."), *identifiers(tree)) for part in word.strip("_").split("_"))
        found |= {f"{name}: {part}" for part in parts if part.lower() in OLD_WORDS}
    assert found == set()
    text = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert [word for word in OLD_NAMES if re.search(rf"\b{word}\b", text)] == []


def test_the_tests_stand_as_the_rooms_do() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    of_tests = {path.name for path in Path(__file__).parent.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert of_tests - rooms == {"fuzz", "golden", "judges", "makers", "mutants"}  # in `pages` README and docs too
