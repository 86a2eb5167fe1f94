"""Inspecting: what an adapter is, how large its updates are, and whether it fits a base. Nothing is written.

    found = lora_build.inspect("./math", base="org/model")
    found.norm, found.is_ok, found.fit.issues

Headers and configs say most of it. The adapter's weights are read once from end to end, for values that are not finite
and for the file's digest, and then one module at a time for the norms; of a base only headers and config are read.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_build.dtypes import FLOATS, torch_dtype
from lora_build.errors import PlanError
from lora_build.files.formats.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, Parts, open_adapter, sort_tensors
from lora_build.files.formats.checkpoint import TensorInfo
from lora_build.files.hashing import HashedFile
from lora_build.files.identity import BASE, SourceName
from lora_build.files.sources import Source, open_hashed, sizes
from lora_build.methods.interface import AdaptedModule, Measurable, Update, methods, unmergeable
from lora_build.methods.lora.implied import Implied
from lora_build.methods.trainable_tokens import token_indices
from lora_build.planning.operations import Merge, Operation
from lora_build.planning.plan import MergePlan, make_plan
from lora_build.planning.resolve import open_source, resolve, split_reference
from lora_build.recipe.schema import AdapterSpec, BaseSpec, Recipe, is_local
from lora_build.recipe.validate import expand

# adapter_config.json: keys that make a LoRA another one, and what its authors call it
_VARIANTS = {
    "use_rslora": "rsLoRA", "use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "kasa_config": "KaSA",
    "velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA", "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
}  # fmt: skip
_INITS = {
    "pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA", "loftq": "LoftQ", "eva": "EVA",
    "mica": "MiCA",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """A parameter that the adapter has factors for.

    What only a measurable method tells of its factors is None for others, and where the factors are not as its config
    says.

    Attributes:
        module: its module's path in memory at training time.
        parameter: its name there, `weight` mostly; empty where unknown.
        tensors: the keys of its factors.
        shape: as the factors have it: [out, in], embeddings [in, out], a stack of experts [E, out, in].
        rank: by the config.
        alpha: by the config.
        scaling: what B @ A is multiplied by: alpha/r, alpha/√r with rsLoRA.
        norm: ‖scaling·B@A‖, Frobenius, over all experts of a stack; None also if it is no number.
    """

    module: str
    parameter: str
    tensors: tuple[str, ...]
    shape: tuple[int, ...] | None = None
    rank: int | None = None
    alpha: float | None = None
    scaling: float | None = None
    norm: float | None = None

    @property
    def path(self) -> str:
        """Its name in messages: that of the module, with a parameter that is not its weight."""
        return self.module if self.parameter in ("", "weight") else f"{self.module}.{self.parameter}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A parameter that the adapter holds whole.

    `kind` is `modules_to_save`, `bias` (trained), `saved` (along with the adapter) or `frozen` (the base's own).
    """

    parameter: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Trained rows of an embedding or head; `indices` is None if the config does not say of which tokens."""

    module: str
    num_tokens: int
    indices: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Touched:
    """A tensor of the base that the adapter changes.

    Attributes:
        name: on disk.
        operation: `merge` or `replace`.
        adapted: what the adapter calls it; several where the base fuses them.
    """

    name: str
    operation: str
    adapted: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How the adapter goes with a base.

    Attributes:
        base: the base's source.
        issues: why it does not fit, one line each, as `lora-build plan` has them; the rest is empty then.
        num_tensors: the tensors of the merged model, by what happens to them: `copy`, `merge`, `replace`.
        touched: those that are not copied.
        notes: what a user should know.
        config_changes: top-level keys of config.json that get another value.
    """

    base: str
    issues: tuple[str, ...] = ()
    num_tensors: Mapping[str, int]
    touched: tuple[Touched, ...] = ()
    notes: tuple[str, ...] = ()
    config_changes: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What an adapter is.

    Attributes:
        source: where it is: a path as written, or `hf://org/name@<40 hex>`.
        config: its adapter_config.json.
        variants: what kind of LoRA it is, such as rsLoRA; empty for the plain one and for other methods.
        num_tensors: its tensors.
        size_bytes: of its weight file.
        digest: of its weight file, `sha256:<hex>`.
        dtypes: how many tensors it has of each dtype.
        adapted: the parameters that it has factors for, by module.
        whole: the parameters that it holds whole.
        tokens: the tokens that it was trained on.
        shared: the tensors that belong to it as a whole.
        training_only: the keys of tensors that merging does not need.
        problems: what keeps it from being merged, whatever the base, one line each.
        fit: how it goes with the base that was named, if one was.
    """

    source: str
    config: Mapping[str, Any]
    variants: tuple[str, ...]
    num_tensors: int
    size_bytes: int
    digest: str
    dtypes: Mapping[str, int]
    adapted: tuple[Adapted, ...]
    whole: tuple[Whole, ...]
    tokens: tuple[Tokens, ...]
    shared: tuple[str, ...]
    training_only: tuple[str, ...]
    problems: tuple[str, ...]
    fit: Fit | None = None

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method, such as LORA."""
        return str(self.config["peft_type"])

    @property
    def is_ok(self) -> bool:
        """Whether nothing is known that keeps it from being merged, into the named base if there is one."""
        return not self.problems and not (self.fit and self.fit.issues)

    @property
    def measured(self) -> tuple[Adapted, ...]:
        """The parameters whose update has a norm, the largest first."""
        found = (a for a in self.adapted if a.norm is not None)
        return tuple(sorted(found, key=lambda a: (-(a.norm or 0.0), a.path)))

    @property
    def norm(self) -> float | None:
        """The Frobenius norm of all updates together; None if one of them has none."""
        norms = [a.norm for a in self.adapted if a.norm is not None]
        return math.hypot(*norms) if norms and len(norms) == len(self.adapted) else None

    @property
    def untrained(self) -> tuple[str, ...]:
        """The parameters whose update is zero."""
        return tuple(a.path for a in self.adapted if a.norm == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """What an adapter's headers and config tell: its tensors sorted, its updates where no base is needed for them."""

    parts: Parts
    layers: Mapping[str, AdaptedModule]
    updates: Mapping[tuple[str, str], Update]
    problems: tuple[str, ...]


def inspect(adapter: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Inspection:
    """Return what an adapter is and, if a base is named, how the two go together.

    Args:
        adapter: a folder, or a Hub repository `org/name` or `org/name@revision`; a folder of this name comes first.
        base: the same, of a base; nothing of it but headers and config is read.

    Raises:
        LoraBuildError: one of them cannot be read. What keeps them from being merged is not raised but returned.
    """
    source, revision = split_reference("adapter", adapter)
    spec = AdapterSpec(source=source, revision=revision)
    name = _name(source)
    recipe = Recipe(name="inspect", adapters={name: spec})
    if base is None:
        opened_source = open_source(recipe, SourceName.of_adapter(name), spec)
        opened = open_adapter(opened_source.read, name, 1.0, sizes(opened_source))
        return _inspect(opened_source, opened, _read(opened))
    source, revision = split_reference("base", base)
    recipe.base = BaseSpec(source=source, revision=revision)
    resolved = resolve(recipe)
    (opened,) = resolved.inputs.adapters
    read, base_uri = _read(opened), resolved.sources[BASE].uri
    try:
        fit = _fit(base_uri, make_plan(recipe, resolved.inputs), read)
    except PlanError as error:
        fit = Fit(base=base_uri, issues=error.issues, num_tensors={}, config_changes={})
    return _inspect(resolved.sources[opened.source], opened, read, fit)


def _name(source: str) -> str:
    """Return what messages call the adapter: the last part of its source, as in a recipe that lists it."""
    path = str(Path(source).expanduser().resolve()) if is_local(source) else source
    return str(*expand({"adapters": [path]})["adapters"])


def _read(adapter: Adapter) -> _Read:
    """Return what an adapter's headers and config tell."""
    method = methods().get(adapter.peft_type)
    if method is None:
        problem = f"{adapter.source}: peft_type {adapter.peft_type} {unmergeable(adapter.peft_type)}"
        return _Read(parts=Parts(), layers={}, updates={}, problems=(problem,))
    parts = sort_tensors(
        adapter,
        method.leaves,
        shared_leaves=getattr(method, "shared_leaves", ()),
        ignored=getattr(method, "ignored", ()),
    )
    wrong = method.check_config(adapter.config)
    problems = [*(f"{adapter.source}/{CONFIG_NAME}: {problem}" for problem in wrong), *parts.problems]
    problems += (
        f"{tensor.source}: {tensor.name} is {tensor.dtype}; merging needs F32, F16 or BF16"
        for factors in parts.factors.values()
        for tensor in factors.values()
        if tensor.dtype not in FLOATS
    )
    measurable = method if isinstance(method, Measurable) and not wrong else None
    layers = {module: _layer(adapter, parts, module, measurable) for module in parts.factors}
    updates: dict[tuple[str, str], Update] = {}
    for layer in layers.values() if measurable else ():
        found, misfits = method.updates(layer)
        problems += misfits
        updates |= {(layer.path, parameter): update for parameter, update in found.items()}
    return _Read(parts=parts, layers=layers, updates=updates, problems=tuple(problems))


def _layer(adapter: Adapter, parts: Parts, module: str, method: Measurable | None) -> AdaptedModule:
    """Return a module with factors, on the base that they imply where the method can tell."""
    layer = AdaptedModule(
        adapter=adapter.name, path=module, config=adapter.config, adapter_weight=adapter.weight,
        factors=parts.factors[module], base=Implied(shapes={}), wrapped=module in parts.wrapped, shared=parts.shared,
        expert_packing=adapter.expert_packing,
    )  # fmt: skip
    return layer if method is None else replace(layer, base=method.implied(layer))


def _inspect(source: Source, adapter: Adapter, read: _Read, fit: Fit | None = None) -> Inspection:
    """Return an inspection, for which the weights are read."""
    with open_hashed(source, WEIGHTS_NAME) as file:
        not_finite = tuple(_not_finite(file, adapter))
        digest = file.finish()
        adapted = tuple(_adapted(file, read, module, parameter) for module, parameter in _parameters_of(read))
    return Inspection(
        source=source.uri,
        config=adapter.config,
        variants=_variants(adapter),
        num_tensors=len(adapter.tensors),
        size_bytes=source.files[WEIGHTS_NAME].size_bytes,
        digest=digest,
        dtypes=dict(sorted(Counter(tensor.dtype for tensor in adapter.tensors.values()).items())),
        adapted=adapted,
        whole=tuple(_whole(adapter, read.parts)),
        tokens=tuple(_tokens(adapter, module, rows) for module, rows in read.parts.tokens.items()),
        shared=tuple(tensor.name for tensor in read.parts.shared.values()),
        training_only=tuple(read.parts.ignored),
        problems=tuple(dict.fromkeys((*read.problems, *not_finite))),
        fit=fit,
    )


def _parameters_of(read: _Read) -> list[tuple[str, str]]:
    """Return (module, parameter) of every update, and (module, "") of each module without any."""
    known = {module for module, _ in read.updates}
    return sorted([*read.updates, *((module, "") for module in read.layers if module not in known)])


def _adapted(file: HashedFile, read: _Read, module: str, parameter: str) -> Adapted:
    layer, update = read.layers[module], read.updates.get((module, parameter))
    method = methods()[str(layer.config["peft_type"])]
    if update is None or not isinstance(method, Measurable):
        tensors = tuple(sorted(tensor.name for tensor in layer.factors.values()))
        return Adapted(module=module, parameter=parameter, tensors=tensors)
    rank, alpha = method.settings(layer, parameter)
    return Adapted(
        module=module,
        parameter=parameter,
        tensors=tuple(sorted(tensor.name for tensor in update.factors.values())),
        shape=layer.base.shape(parameter),
        rank=rank,
        alpha=alpha,
        scaling=update.scale,
        norm=_norm(file, method, update),
    )


def _norm(file: HashedFile, method: Measurable, update: Update) -> float | None:
    if any(tensor.dtype not in FLOATS for tensor in update.factors.values()):
        return None
    norm = math.hypot(*method.norms(update, {role: _load(file, tensor) for role, tensor in update.factors.items()}))
    return norm if math.isfinite(norm) else None


def _load(file: HashedFile, tensor: TensorInfo) -> Any:
    """Return a tensor's values, a `torch.Tensor`."""
    import torch

    data = file.read(tensor.start, tensor.end)
    dtype = torch_dtype(tensor.dtype)
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(tensor.shape)


def _not_finite(file: HashedFile, adapter: Adapter) -> Iterator[str]:
    """Yield a line for each tensor that holds a NaN or an infinity."""
    import torch

    for tensor in sorted(adapter.tensors.values(), key=lambda t: t.start):
        if tensor.dtype not in FLOATS:
            continue
        bad: list[tuple[int, float]] = []  # the first one of each chunk
        count = at = 0
        for data in file.chunks(tensor.start, tensor.end):
            x = torch.frombuffer(data, dtype=torch_dtype(tensor.dtype))
            places = (~torch.isfinite(x)).nonzero().flatten()
            bad += [(at + int(place), float(x[place])) for place in places[:1]]
            count += len(places)
            at += len(x)
        if bad:
            place, value = bad[0]
            index = [place // math.prod(tensor.shape[i + 1 :]) % n for i, n in enumerate(tensor.shape)]
            yield (
                f"{adapter.source}: '{tensor.name}' is not finite: {value} at {index}, {count} of "
                f"{tensor.num_elements} elements in all; take another checkpoint of its training"
            )


def _variants(adapter: Adapter) -> tuple[str, ...]:
    if adapter.peft_type != "LORA":
        return ()
    found = [name for key, name in _VARIANTS.items() if adapter.config.get(key)]
    init = str(adapter.config.get("init_lora_weights")).lower()
    return (*found, *(name for key, name in _INITS.items() if init.startswith(key)))


def _whole(adapter: Adapter, parts: Parts) -> Iterator[Whole]:
    saved = [str(name) for name in adapter.config.get("modules_to_save") or ()]
    for frozen, tensors in ((False, parts.replaced), (True, parts.frozen)):
        for parameter, tensor in tensors.items():
            if frozen:
                what = "frozen"
            elif any(f".{name}." in f".{parameter}" for name in saved):
                what = "modules_to_save"
            else:
                what = "bias" if parameter.endswith(".bias") else "saved"
            yield Whole(
                parameter=parameter, kind=what, dtype=tensor.dtype, shape=tensor.shape, size_bytes=tensor.num_bytes
            )


def _tokens(adapter: Adapter, module: str, rows: TensorInfo) -> Tokens:
    indices = token_indices(adapter.config, module)
    num_tokens = rows.shape[0] if rows.shape else 0
    return Tokens(module=module, num_tokens=num_tokens, indices=None if indices is None else tuple(indices))


def _fit(base: str, plan: MergePlan, read: _Read) -> Fit:
    names = _names(read)
    return Fit(
        base=base,
        num_tensors=dict(Counter(op.verb for op in plan.operations)),
        touched=tuple(
            Touched(name=op.name, operation=op.verb, adapted=tuple(sorted({names[t.name] for t in _used(op, names)})))
            for op in plan.operations
            if op.verb != "copy"
        ),
        notes=plan.notes,
        config_changes=plan.config_changes,
    )


def _used(operation: Operation, names: Mapping[str, str]) -> list[TensorInfo]:
    """Return the tensors of the adapter that go into an output tensor, without those it has in common."""
    updates = operation.updates if isinstance(operation, Merge) else ()
    tensors = (operation.source, *(tensor for update in updates for tensor in update.factors.values()))
    return [tensor for tensor in tensors if not tensor.source.is_base and tensor.name in names]


def _names(read: _Read) -> dict[str, str]:
    """Return what the adapter calls the parameter that each of its keys is for."""
    parts = read.parts
    found = {t.name: f"{module}.weight" for module, factors in parts.factors.items() for t in factors.values()}
    found |= {t.name: f"{m}.{parameter}" for (m, parameter), u in read.updates.items() for t in u.factors.values()}
    found |= {rows.name: f"{module}.weight" for module, rows in parts.tokens.items()}
    return found | {t.name: parameter for group in (parts.replaced, parts.frozen) for parameter, t in group.items()}
