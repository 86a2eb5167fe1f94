"""Asks the transformers of this process what a base is; run as a program, for the process that started it.

    python -m lora_build.models.ask < question > answer

The question is `{"config": config.json's, "tensors": {name: shape}, "paths": [...]}`, the answer a record of `facts`;
with `"head": {"trained_as": [task_type, class], "replaced": {path: shape}}` it is the record of a `heads.Head`.
The model is made on the meta device: no weights are read, and no code of the checkpoint's is run.
"""

import contextlib
import json
import os
import re
import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace

from lora_build.errors import SourceError
from lora_build.files.formats.config_json import ModelConfig
from lora_build.models.architecture import Architecture, NoArchitectureError, read_architecture, read_ties
from lora_build.models.facts import Facts, Ties
from lora_build.models.heads import head_of
from lora_build.models.in_memory import Model, read_model
from lora_build.models.keep_float32 import kept_by_table, matching
from lora_build.models.names import names_beside

_HALVES = ("F16", "BF16")
_MAX_BYTES = 6 << 30


def answer(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], paths: Iterable[str] = ()) -> Facts:
    """Return what transformers says of a base; takes some seconds.

    Args:
        config: its config.json.
        shapes: of its tensors, by their names on disk.
        paths: that adapters have for parameters, where no tensor has such a name.
    """
    try:
        architecture = read_architecture(config)
        ties = read_ties(config) if architecture.tied else Ties({}, {})
    except SourceError as error:
        is_known = not isinstance(error.__cause__, NoArchitectureError)
        return Facts(problem=str(error).partition(": ")[2].partition(": ")[2], may_change=is_known)
    model = read_model(architecture, shapes, paths)
    model = replace(model, renamed={**model.renamed, **_of_ties(architecture, model, ties)})
    memory = architecture.memory.shapes
    table = kept_by_table(config) or {}
    return Facts(
        body=architecture.body,
        prefix=architecture.prefix,
        missing=tuple(sorted(_missing(architecture, model, ties))),
        unexpected=tuple(sorted(_unexpected(architecture, shapes.keys() - model.fed_by.keys()))),
        mismatched={
            name: f"{list(made.shape)}, by config.json {list(memory[name])}"
            for name, made in sorted(model.parameters.items())
            if name in memory and made.shape != memory[name]
        } | dict(sorted(model.incomplete.items())),
        tied=ties.tied,
        untied=ties.untied,
        float32={dtype: _fed(model, architecture.float32.get(dtype, ())) for dtype in _HALVES},
        model=model.to_json(),
        stays={dtype: _fed(model, table.get(dtype, ())) for dtype in _HALVES},
    )  # fmt: skip


def _of_ties(architecture: Architecture, model: Model, ties: Ties) -> dict[str, str]:
    """Return what tied parameters are called, and what their tensors may be called once a tie is cut; see `renamed`."""
    homes = {path: name for name, path in model.fed_by.items()}
    pairs = [(path, homes[root]) for path, root in ties.tied.items() if root in homes]
    names = {*ties.tied, *ties.tied.values(), *(name for path, home in pairs for name in names_beside(path, home))}
    return {name: architecture.rename(name) for name in sorted(names)}


def _missing(architecture: Architecture, model: Model, ties: Ties) -> set[str]:
    """Return the parameters that no tensor becomes. Of those that share a tensor, one is enough, whichever it is."""
    found = model.parameters.keys() | model.unsupported.keys()
    missing = {name for name in architecture.memory.shapes.keys() - found if not ties.group(name) & found}
    return missing - set(matching(missing, architecture.may_miss))


def _unexpected(architecture: Architecture, unused: Iterable[str]) -> Iterable[str]:
    ignored = "|".join(f"({pattern})" for pattern in architecture.may_have)
    return (name for name in unused if not (ignored and re.search(ignored, architecture.rename(name))))


def _fed(model: Model, globs: Iterable[str]) -> tuple[str, ...]:
    """Return the tensors on disk that go into parameters with one of these parts in their paths."""
    kept = set(matching(set(model.fed_by.values()), globs))
    return tuple(sorted(name for name, target in model.fed_by.items() if target in kept))


def answer_question(text: str) -> str:
    """Return the answer to a question, both as they are written."""
    question = json.loads(text)
    config, shapes, paths = ModelConfig.of(question["config"]), _shapes(question["tensors"]), question["paths"]
    if "head" not in question:
        return answer(config, shapes, paths).to_json()
    replaced = _shapes(question["head"]["replaced"])
    head = head_of(config, question["head"]["trained_as"], replaced, shapes)
    if head.added:
        there = {name: shape for name, shape in shapes.items() if name not in head.dropped}
        there |= {name: replaced[path] for name, path in head.added.items()}
        head = replace(head, facts=answer(config.with_changes(head.config_changes), there, paths))
    return head.to_json()


def _shapes(written: Mapping[str, list[int]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in written.items()}


def main() -> None:
    """Read a question and write its answer; what others print goes elsewhere."""
    with contextlib.suppress(OSError, ValueError):  # a config may ask for a model without end
        resource.setrlimit(resource.RLIMIT_DATA, (_MAX_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    out = os.dup(1)
    os.dup2(2, 1)
    found = answer_question(sys.stdin.read())
    with os.fdopen(out, "w", encoding="utf-8") as file:
        file.write(found)


if __name__ == "__main__":
    main()
