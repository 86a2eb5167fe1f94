"""Asks the transformers of this process what a base is; run as a program, for the process that started it.

    python -m lora_build.models.ask < question > answer

The question is `{"config": config.json's, "tensors": {name: shape}, "paths": [...]}`, the answer a record of `facts`.
The model is made on the meta device: no weights are read, and no code of the checkpoint's is run.
"""

import contextlib
import json
import os
import re
import resource
import sys
from collections.abc import Iterable, Mapping

from lora_build.errors import SourceError
from lora_build.files.formats.config_json import ModelConfig
from lora_build.models.architecture import UNTOLD, Architecture, read_architecture, read_ties
from lora_build.models.facts import Facts, Ties
from lora_build.models.in_memory import Model, read_model
from lora_build.models.keep_float32 import kept_by_table, matching

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
    except SourceError as error:
        return Facts(problem=str(error).partition(f"{UNTOLD}: ")[2])
    model = read_model(architecture, shapes, paths)
    memory = architecture.memory.shapes
    ties = read_ties(config) if architecture.tied else Ties({}, {})
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


def answer_question(text: str) -> Facts:
    """Return the answer to a question as it is written."""
    question = json.loads(text)
    shapes = {name: tuple(shape) for name, shape in question["tensors"].items()}
    return answer(ModelConfig.of(question["config"]), shapes, question["paths"])


def main() -> None:
    """Read a question and write its answer; what others print goes elsewhere."""
    with contextlib.suppress(OSError, ValueError):  # a config may ask for a model without end
        resource.setrlimit(resource.RLIMIT_DATA, (_MAX_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    out = os.dup(1)
    os.dup2(2, 1)
    found = answer_question(sys.stdin.read()).to_json()
    with os.fdopen(out, "w", encoding="utf-8") as file:
        file.write(found)


if __name__ == "__main__":
    main()
