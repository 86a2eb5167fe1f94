"""The floors of docs/how-it-works.md: a module imports only from floors below its own."""

import ast
from pathlib import Path

import lora_build

PACKAGE = Path(lora_build.__file__).parent
FLOORS = [
    {"buffers", "compiled", "errors", "known_answer", "lanes", "survival"},
    {"digests", "kernel", "parameters", "recipe"},
    {"arithmetic", "checkpoint", "conversion", "recipe_check", "sources", "sinks"},
    {"architecture", "methods", "recipe_files"},
    {"experts"},
    {"adapter", "attached", "forward_inputs", "forward_trace", "loading", "methods._shared", "naming", "operations"},
    {"live", "methods._lora_pairs", "methods._lora_shapes", "methods.trainable_tokens", "replication", "tying"},
    {"blocks", "methods._lora_implied", "methods._lora_merge"},
    {"forward_weights", "fused", "methods._lora_forward"},
    {"heads", "methods.lora", "peft_layers"}
    | {f"methods.{name}" for name in ("adalora", "ia3", "loha", "lokr", "oft", "vera")},
    {"layout", "peft_numerics"},
    {"draft"},
    {"plan"},
    {"manifest", "torch_blocks"},
    {"engine", "provenance", "resolve"},
    {"inspection", "model", "origin"},
    {"forward_check"},
    {"memory"},
    {"pipeline"},
    {"console", "recipe_source", "sweep"},
    {"app"},
    {"__main__"},
]
ONLY = {"hydra": {"app", "recipe_source"}, "peft": set(), "rich": {"console", "model"}, "yaml": {"recipe_files"}}
LAZY = {"torch", "transformers", "huggingface_hub", "numpy"}
EAGER_NUMPY = {"fused", "kernel", "known_answer", "methods._lora_pairs"}
EAGER_TORCH = {"arithmetic", "attached", "torch_blocks", "live", "loading", "memory", "model", "peft_numerics"}
EAGER_TORCH |= {
    "forward_check",
    "forward_inputs",
    "forward_trace",
    "forward_weights",
    "methods._lora_forward",
    "methods._lora_merge",
}


def modules() -> dict[str, ast.Module]:
    paths = {p: ".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in sorted(PACKAGE.rglob("*.py"))}
    named = {name.removesuffix(".__init__"): ast.parse(path.read_text()) for path, name in paths.items()}
    del named["__init__"]  # the package's façade stands outside of the floors
    return named


def imports(tree: ast.AST, *, eager: bool = False) -> set[str]:
    """Return imported names, those for type checkers left out; only the ones at module level if `eager`."""
    found: set[str] = set()
    nodes = list(ast.iter_child_nodes(tree))
    while nodes:
        node = nodes.pop()
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.FunctionDef() if eager:
                continue
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(module), names=names):
                found |= {module, *(f"{module}.{alias.name}" for alias in names)}
        nodes += ast.iter_child_nodes(node)
    return found


def ours(names: set[str], known: set[str]) -> set[str]:
    return {n for name in names if (n := name.removeprefix("lora_build.")) in known and name.startswith("lora_build.")}


def test_every_module_has_a_floor_and_every_floor_its_modules() -> None:
    assert set(modules()) == set().union(*FLOORS)


def test_a_module_imports_only_from_lower_floors() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = [
        f"{name} imports {other}"
        for name, tree in modules().items()
        for other in ours(imports(tree), set(floor))
        if floor[other] >= floor[name]
    ]
    assert wrong == []


def test_only_the_runner_knows_hydra_and_nobody_knows_peft() -> None:
    for library, allowed in ONLY.items():
        users = {n for n, tree in modules().items() if any(i.split(".")[0] == library for i in imports(tree))}
        assert users <= allowed, library


def test_heavy_libraries_are_imported_only_where_they_are_used() -> None:
    for name, tree in modules().items():
        heavy = {i.split(".")[0] for i in imports(tree, eager=True)} & LAZY
        allowed = {"torch", "numpy"} if name in EAGER_TORCH else {"numpy"} if name in EAGER_NUMPY else set()
        assert heavy <= allowed, name
