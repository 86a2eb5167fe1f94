"""The plan: what will happen to every tensor, decided from headers and configs alone. Pure, and without torch.

Closed world: every adapter tensor is consumed once, every output tensor is a copy of the base's bytes or named here as
converted, replaced or merged. Whatever does not fit is an issue; all issues are raised together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_build.adapter import CONFIG_NAME, Adapter, Parts, sort_tensors
from lora_build.adapter import WEIGHTS_NAME as ADAPTER_WEIGHTS_NAME
from lora_build.checkpoint import (
    INDEX_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    TensorInfo,
    format_index,
    patch_json,
)  # fmt: skip
from lora_build.errors import PlanError, SourceError, did_you_mean
from lora_build.methods import Layer, Method, Update, methods
from lora_build.naming import Names, Ties, is_conv1d, read_ties
from lora_build.operations import Copy, Merge, Operation, Shard, kind, lay_out, output_bytes
from lora_build.recipe import DType, Recipe, Tied, parse_size

NUMERICS = "exact-1"  # what arithmetic.py computes; another id means that bits may differ
FLOATS = {"F64", "F32", "F16", "BF16"}
_MERGEABLE = {"F32", "F16", "BF16"}
_DTYPE_NAMES = {DType.float32: "F32", DType.float16: "F16", DType.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a recipe is today: the base and the adapters that take part, in the recipe's order.

    `whole_digests` holds the SHA-256 of the data of whole parameters in adapters (frozen or replaced ones), by
    (adapter, key): two of them may be the same.
    """

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    whole_digests: Mapping[tuple[str, str], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """Everything that a build will do.

    Attributes:
        options: the recipe's choices that can change the output or what is proven of it.
        weights: the weight of each adapter, by its name.
        input_files: the files that are read, by source (`base`, `adapters.math`).
        shards: the files with tensors.
        config: the output's config.json: the base's, with only the keys of `config_changes` set.
        config_changes: top-level keys of config.json that get another value.
        side_files: the base's files that go along unchanged.
        left_out: the base's files that do not.
        notes: what a user should know, one line each.
    """

    options: Mapping[str, Any]
    weights: Mapping[str, float]
    input_files: Mapping[str, tuple[str, ...]]
    shards: tuple[Shard, ...]
    config: bytes
    config_changes: Mapping[str, Any]
    side_files: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def operations(self) -> tuple[Operation, ...]:
        """All operations, shard by shard."""
        return tuple(op for shard in self.shards for op in shard.operations)

    @property
    def num_bytes(self) -> int:
        """The bytes of the output's weight files."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def index(self) -> bytes | None:
        """The text of model.safetensors.index.json, or None for a single file."""
        if [shard.file for shard in self.shards] == [WEIGHTS_NAME]:
            return None
        return format_index(
            {op.name: shard.file for shard in self.shards for op in shard.operations},
            total_parameters=sum(op.source.num_elements for op in self.operations),
            total_size_bytes=sum(output_bytes(op) for op in self.operations),
        )


def make_plan(recipe: Recipe, inputs: Inputs) -> MergePlan:
    """Return the plan of a recipe on its inputs.

    Raises:
        PlanError: base, adapters and recipe do not fit together; with every issue found.
    """
    draft = _Draft(recipe, inputs.base)
    for adapter in inputs.adapters:
        draft.add(adapter, inputs.whole_digests)
    draft.check_conflicts()
    operations = draft.operations()
    if not inputs.adapters:
        draft.issues.append("no adapter is left to merge: every weight is 0; the output would equal the base")
    elif not draft.issues and not any(isinstance(op, Merge) or kind(op) == "replace" for op in operations):
        draft.issues.append("the adapters change nothing: the output would equal the base")
    if draft.issues:
        raise PlanError(dict.fromkeys(draft.issues))
    config_changes = draft.config_changes | _dtype_changes(recipe.dtype, inputs.base.config)
    return MergePlan(
        options={
            "combine": recipe.combine.method.value,
            "dtype": recipe.dtype.value,
            "max_shard_size": parse_size(recipe.output.max_shard_size) or "keep",
            "numerics": NUMERICS,
            "safe_merge": recipe.safe_merge,
            "tied": recipe.tied.value,
        },
        weights={adapter.name: adapter.weight for adapter in inputs.adapters},
        input_files={"base": _base_files(inputs.base)}
        | {adapter.source: (CONFIG_NAME, ADAPTER_WEIGHTS_NAME) for adapter in inputs.adapters},
        shards=lay_out(parse_size(recipe.output.max_shard_size), draft.homes, inputs.base.shards, operations),
        config=patch_json(inputs.base.config_text, config_changes).encode(),
        config_changes=config_changes,
        side_files=inputs.base.side_files,
        left_out=inputs.base.left_out,
        notes=tuple(draft.notes),
    )


@dataclass
class _Draft:
    """The plan while adapters are added to it: what each output tensor is made of, and what is wrong so far."""

    recipe: Recipe
    base: Checkpoint
    sources: dict[str, TensorInfo] = field(init=False)
    updates: dict[str, list[Update]] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    frozen: dict[str, tuple[str, str]] = field(default_factory=dict)
    issues: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    config_changes: dict[str, Any] = field(default_factory=dict)
    names: Names = field(init=False)
    homes: dict[str, str] = field(init=False)
    _ties: Ties | None = None
    _replacing: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sources = dict(self.base.tensors)
        self.homes = {name: tensor.file for name, tensor in self.base.tensors.items()}
        self.names = Names(frozenset(self.base.tensors))

    def add(self, adapter: Adapter, digests: Mapping[tuple[str, str], str]) -> None:
        """Add what one adapter does, or why it cannot."""
        method = methods().get(adapter.peft_type)
        if method is None:
            known = ", ".join(sorted(methods()))
            near = did_you_mean(adapter.peft_type, methods())
            self.issues.append(
                f"{adapter.source}: peft_type {adapter.peft_type} cannot be merged; known: {known}{near}"
            )
            return
        problems = method.check_config(adapter.config)
        self.issues += [f"{adapter.source}/adapter_config.json: {problem}" for problem in problems]
        parts = sort_tensors(adapter, method.leaves)
        self.issues += parts.problems
        if problems:
            return
        self._replacing = {parameter: digests[adapter.name, t.name] for parameter, t in parts.replaced.items()}
        for parameter, tensor in parts.frozen.items():
            self._freeze(adapter, parameter, tensor, digests[adapter.name, tensor.name])
        for parameter, tensor in parts.replaced.items():
            self._replace(adapter, parameter, tensor)
        for module in parts.factors:
            self._update(adapter, method, module, parts)

    def _freeze(self, adapter: Adapter, parameter: str, tensor: TensorInfo, digest: str) -> None:
        name = self._find(adapter, parameter, tensor)
        if name is None:
            return
        owner, other = self.frozen.setdefault(name, (adapter.name, digest))
        if other != digest:
            self.issues.append(
                f"{adapter.source}: '{tensor.name}' and the one of adapter {owner} differ: "
                "they were trained on different bases"
            )
        self.notes.append(f"{name} comes from adapter {adapter.name}, which saved its base's along")
        self.sources[name] = tensor

    def _replace(self, adapter: Adapter, parameter: str, tensor: TensorInfo) -> None:
        name = self._find(adapter, parameter, tensor)
        if name is None:
            return
        if self.replaced.get(name, adapter.name) != adapter.name:
            self.issues.append(
                f"adapters {self.replaced[name]} and {adapter.name} both replace {name}; merge only one of them"
            )
        if adapter.weight != 1:
            self.issues.append(
                f"{adapter.source}: has weight {adapter.weight!r}, but it replaces {name} whole, "
                "which cannot be weighted; set its weight to 1"
            )
        self.replaced[name] = adapter.name
        self.sources[name] = tensor

    def _update(self, adapter: Adapter, method: Method, module: str, parts: Parts) -> None:
        name = self._find(adapter, f"{module}.weight", None)
        if name is None:
            return
        bias_name = self.names.find(f"{module}.bias")
        layer = Layer(
            adapter=adapter.name,
            module=module,
            config=adapter.config,
            adapter_weight=adapter.weight,
            factors=parts.factors[module],
            weight=self.sources[name],
            bias=self.sources[bias_name] if bias_name else None,
            conv1d=is_conv1d(self.base.config, module),
        )
        updates, problems = method.updates(layer)
        self.issues += problems
        targets = {"weight": name, "bias": bias_name}
        for parameter, update in updates.items():
            target = targets[parameter]
            assert target is not None
            self.updates.setdefault(target, []).append(update)
            self._check_dtypes(target, update)

    def _check_dtypes(self, name: str, update: Update) -> None:
        for tensor in (self.sources[name], *update.factors.values()):
            if tensor.dtype not in _MERGEABLE and not (tensor.dtype == "F64" and tensor.source != "base"):
                self.issues.append(f"{tensor.source}: {tensor.name} is {tensor.dtype}; merging needs F32, F16 or BF16")

    def _find(self, adapter: Adapter, parameter: str, tensor: TensorInfo | None) -> str | None:
        """Return the output tensor that an adapter's parameter means, adding it where a tie has to be cut for it."""
        name = self.names.find(parameter)
        if name is None or self._may_be_tied(name):
            name = self._find_tied(parameter, name)
        if name is None:
            self.issues.append(
                f"{adapter.source}: adapts '{parameter}', which the base does not have{self.names.nearest(parameter)}"
            )
        elif tensor is not None and tensor.shape != self.sources[name].shape:
            self.issues.append(
                f"{adapter.source}: '{tensor.name}' is {list(tensor.shape)}, the base's {name} is "
                f"{list(self.sources[name].shape)}; was it trained on another base, or with another vocabulary?"
            )
            return None
        elif tensor is not None and tensor.dtype not in FLOATS:
            self.issues.append(f"{adapter.source}: '{tensor.name}' is {tensor.dtype}, expected one of {sorted(FLOATS)}")
        return name

    def _may_be_tied(self, name: str) -> bool:
        shape = self.sources[name].shape
        tied = self.base.config.get("tie_word_embeddings")
        return tied is not False and len(shape) == 2 and shape[0] in _vocab_sizes(self.base.config)

    def _find_tied(self, parameter: str, on_disk: str | None) -> str | None:
        """Return the output tensor of a parameter that may share its own with others, cutting the tie if need be."""
        if self.base.config.get("tie_word_embeddings") is False:
            return on_disk
        if on_disk is None and any(part.isdigit() for part in parameter.split(".")):
            return None  # nothing in a numbered layer is tied
        if self._ties is None:
            try:
                self._ties = read_ties(self.base.config)
            except SourceError as error:
                self.issues.append(str(error))
                self._ties = Ties({}, {})
        ties = self._ties
        member = next((m for m in (*ties.tied, *ties.tied.values()) if _same(m, parameter)), None)
        if member is None or len(ties.group(member)) == 1:
            return on_disk
        on_base = Names(frozenset(self.base.tensors))
        shared = next((name for m in sorted(ties.group(member)) if (name := on_base.find(m))), None)
        if shared is None:
            return None
        if len(values := {self._replacement(m) for m in ties.group(member)}) == 1 and None not in values:
            return shared  # the adapter replaces all that share it by one value
        if self.recipe.tied is Tied.error:
            others = ", ".join(sorted(ties.group(member) - {member}))
            self.issues.append(
                f"base: {member} is tied to {others}, an adapter changes it, and the recipe says tied: error"
            )
            return shared
        if self.recipe.tied is Tied.peft and parameter not in self._replacing:
            self.notes.append(
                f"{member} is tied: its update goes into {shared} and so into all that share it (tied: peft)"
            )
            return shared
        bound = sorted({m for pair in ties.untied.items() if member in pair for m in pair} - {member})
        if bound:
            self.issues.append(
                f"base: {member} shares its tensor with {', '.join(bound)} whatever tie_word_embeddings says, "
                "so an update to it alone cannot be kept apart; set tied: peft to share it"
            )
            return shared
        self._cut_ties(ties)
        return self.names.find(member)

    def _replacement(self, member: str) -> str | None:
        return next((digest for parameter, digest in self._replacing.items() if _same(member, parameter)), None)

    def _cut_ties(self, ties: Ties) -> None:
        """Give every parameter that `tie_word_embeddings: false` sets free a tensor of its own."""
        if "tie_word_embeddings" in self.config_changes:
            return
        self.config_changes["tie_word_embeddings"] = False
        for member in sorted(ties.tied.keys() - ties.untied.keys()):
            root = self.names.find(ties.tied[member])
            if root is None:
                self.issues.append(f"base: {member} is tied to {ties.tied[member]}, which is not among its tensors")
            elif self.names.find(member) is None:
                self.sources[member] = self.sources[root]
                self.homes[member] = self.homes[root]
                self.notes.append(
                    f"{member} is written beside {root}: an adapter changes one of the two, which were tied"
                )
        self.names = Names(frozenset(self.sources))

    def check_conflicts(self) -> None:
        """Report parameters that one adapter replaces and another updates: nobody can say which comes first."""
        for name, owner in sorted(self.replaced.items()):
            for update in self.updates.get(name, []):
                if update.adapter != owner:
                    self.issues.append(
                        f"adapter {owner} replaces {name} and adapter {update.adapter} updates it; merge only one"
                    )

    def operations(self) -> list[Operation]:
        """Return what happens to each output tensor, in the order of the base's files."""
        order = {file: place for place, file in enumerate(self.base.shards)}
        starts = {name: t.start for name, t in self.base.tensors.items()}
        names = sorted(self.sources, key=lambda n: (order[self.homes[n]], starts.get(n, 0), n))
        return [self._operation(name) for name in names]

    def _operation(self, name: str) -> Operation:
        source = self.sources[name]
        stored = self.base.tensors[name].dtype if name in self.base.tensors else source.dtype
        wanted = _DTYPE_NAMES.get(self.recipe.dtype)
        if wanted and stored.startswith("F8"):
            self.issues.append(f"base: {name} is {stored}; such a base cannot be converted, set dtype: keep")
        dtype = wanted if wanted and stored in FLOATS else stored
        updates = self.updates.get(name)
        if not updates:
            return Copy(name=name, dtype=dtype, source=source)
        if len({update.method for update in updates}) > 1:
            self.issues.append(f"{name}: adapters of different methods update it; merge them one after another")
        return Merge(name=name, dtype=dtype, source=source, updates=tuple(updates))


def _base_files(base: Checkpoint) -> tuple[str, ...]:
    index = (INDEX_NAME,) if base.is_sharded else ()
    return tuple(sorted(("config.json", *index, *base.shards, *base.side_files)))


def _same(a: str, b: str) -> bool:
    return a == b or a.endswith("." + b) or b.endswith("." + a)


def _vocab_sizes(config: Mapping[str, Any]) -> set[int]:
    nested = (value for value in config.values() if isinstance(value, dict))
    return {n for c in (config, *nested) if isinstance(n := c.get("vocab_size"), int)}


def _dtype_changes(dtype: DType, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of config.json that name the dtype, `dtype` or the older `torch_dtype`, nested ones included."""
    if dtype is DType.keep:
        return {}

    def patched(part: Mapping[str, Any]) -> dict[str, Any]:
        changes: dict[str, Any] = {
            key: dtype.value for key in ("dtype", "torch_dtype") if isinstance(part.get(key), str)
        }
        for key, value in part.items():
            if key.endswith("_config") and isinstance(value, dict) and (inner := patched(value)):
                changes[key] = value | inner
        return changes

    return {"dtype": dtype.value} | patched(config) if "torch_dtype" not in config else patched(config)
