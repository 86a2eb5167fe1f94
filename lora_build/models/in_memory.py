"""In memory: what transformers makes of a base's tensors, as a value that can be kept as text.

    {"plain": [...], "parameters": {"h.0.attn.q": [[8, 6], [["h.0.attn.qkv", null, "0:8", 0, false]]]}, ...}

Most parameters are a tensor of the same name, so text names only the others.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Any

from lora_build.models.architecture import Architecture, Module
from lora_build.models.conversion import MismatchedConversionError, UnsupportedConversionError, convert
from lora_build.models.parameters import Parameter, Part


@dataclass(frozen=True, kw_only=True)
class Model:
    """A base's parameters in memory. `Model.from_json(m.to_json(), shapes) == m`, of the shapes on disk.

    Attributes:
        parameters: those that the checkpoint holds, by path.
        unsupported: why others cannot be found, by path.
        incomplete: those of them that some of their tensors are missing for, each with what there is.
        fed_by: for each disk tensor a parameter that it goes into.
        modules: what the modules are that have parameters, by path.
        renamed: paths of older versions of transformers that were asked for, with today's.
        problem: why nobody knows the model; the rest is empty then.
    """

    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)
    incomplete: Mapping[str, str] = field(default_factory=dict)
    fed_by: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, Module] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""

    @cached_property
    def plain(self) -> frozenset[str]:
        """The tensors that are parameters as they are."""
        parts = (made.parts for made in self.parameters.values())
        return frozenset(some[0].name for some in parts if some == (Part(name=some[0].name),))

    @cached_property
    def paths(self) -> frozenset[str]:
        """The paths of all parameters."""
        return frozenset(self.parameters.keys() | self.unsupported.keys())

    def module_of(self, parameter: str) -> Module:
        """Return the module that a parameter belongs to."""
        return self.modules[owner_of(parameter)]

    def to_json(self) -> str:
        """Return the text that keeps it."""
        same = {name for name in self.parameters if _is_same(self.parameters[name])}
        kinds = list(dict.fromkeys(self.modules.values()))
        places = {module: place for place, module in enumerate(kinds)}
        derived = _fed_by(self.parameters.values())
        others = {name: made for name, made in self.parameters.items() if name not in same}
        return json.dumps({
            "same": [name for name in self.parameters if name in same],
            "parameters": {name: [made.shape, list(map(_part, made.parts))] for name, made in others.items()},
            "unsupported": self.unsupported,
            "incomplete": self.incomplete,
            "fed_by": {name: path for name, path in self.fed_by.items() if derived.get(name) != path},
            "kinds": [astuple(kind) for kind in kinds],
            "modules": {path: places[module] for path, module in self.modules.items()},
            "renamed": self.renamed,
        })  # fmt: skip

    @classmethod
    def from_json(cls, text: str, shapes: Mapping[str, tuple[int, ...]]) -> "Model":
        """Return what a text keeps, of a base whose tensors have these shapes."""
        data = json.loads(text)
        parameters = {name: Parameter(name=name, shape=shapes[name], parts=(Part(name=name),)) for name in data["same"]}
        for name, (shape, parts) in data["parameters"].items():
            parameters[name] = Parameter(name=name, shape=tuple(shape), parts=tuple(map(_read_part, parts)))
        kinds = [_read_module(*kind) for kind in data["kinds"]]
        return cls(
            parameters=parameters,
            unsupported=data["unsupported"],
            incomplete=data["incomplete"],
            fed_by=_fed_by(parameters.values()) | data["fed_by"],
            modules={path: kinds[place] for path, place in data["modules"].items()},
            renamed=data["renamed"],
        )


def owner_of(parameter: str) -> str:
    """Return the path of a parameter's module; of one that is reparametrized, the module whose weight it makes."""
    return parameter.rpartition(".")[0].partition(".parametrizations.")[0]


def read_model(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], paths: Iterable[str] = ()) -> Model:
    """Return the parameters of a base in memory.

    Args:
        architecture: what transformers knows of it.
        shapes: of its tensors on disk.
        paths: of an adapter, which may be those of an older version of transformers.
    """
    parameters: dict[str, Parameter] = {}
    unsupported: dict[str, str] = {}
    incomplete: dict[str, str] = {}
    fed_by: dict[str, str] = {}
    for conversion in architecture.conversions(shapes):
        fed_by |= {name: conversion.target for names in conversion.tensors.values() for name in names}
        try:
            parameters |= {made.name: made for made in convert(conversion, shapes, architecture.memory)}
        except UnsupportedConversionError as error:
            reason = f"transformers stores it through {error}, which cannot be followed yet"
            unsupported |= dict.fromkeys(conversion.parameters, reason)
            lacking = conversion.lacking or (str(error) if isinstance(error, MismatchedConversionError) else "")
            incomplete |= dict.fromkeys(conversion.parameters, lacking) if lacking else {}
    owners = dict.fromkeys(map(owner_of, (*parameters, *unsupported, *fed_by.values())))
    return Model(
        parameters=parameters,
        unsupported=unsupported,
        incomplete=incomplete,
        fed_by=fed_by,
        modules={path: architecture.modules[path] for path in owners if path in architecture.modules},
        renamed={path: architecture.rename(path) for path in paths},
    )


def _is_same(parameter: Parameter) -> bool:
    return parameter.parts == (Part(name=parameter.name),)


def _fed_by(parameters: Iterable[Parameter]) -> dict[str, str]:
    """Return for each tensor the first parameter that it has a part of."""
    found: dict[str, str] = {}
    for parameter in parameters:
        for part in parameter.parts:
            found.setdefault(part.name, parameter.name)
    return found


def _part(part: Part) -> list[Any] | str:
    """Return a part as text has it: a name where it is all of a tensor; rows as `0:8` where they follow each other."""
    if part == Part(name=part.name):
        return part.name
    rows: Sequence[int] | str | None = part.rows
    if isinstance(rows, range) and rows.step == 1:
        rows = f"{rows.start}:{rows.stop}"
    return [part.name, part.expert, rows, part.first, part.transposed]


def _read_part(data: Any) -> Part:
    if isinstance(data, str):
        return Part(name=data)
    name, expert, rows, first, transposed = data
    if isinstance(rows, str):
        rows = range(*map(int, rows.split(":")))
    return Part(
        name=name,
        expert=expert,
        rows=tuple(rows) if isinstance(rows, list) else rows,
        first=first,
        transposed=transposed,
    )


def _read_module(layer_type: str, groups: int, dilation: Any, parameters: Any, is_transposed: bool | None) -> Module:
    return Module(
        layer_type=layer_type, groups=groups, dilation=tuple(dilation), parameters=tuple(parameters),
        is_transposed=is_transposed,
    )  # fmt: skip
