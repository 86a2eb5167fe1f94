"""The draft of a plan: what each output tensor is made of while adapters are added, and all that is wrong so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora_build.adapter import Adapter, Parts, sort_tensors
from lora_build.checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo
from lora_build.errors import PlanError, did_you_mean
from lora_build.heads import head_of, vocabulary_changes
from lora_build.methods import Layer, Method, Update, methods
from lora_build.methods.trainable_tokens import TrainableTokens, replacement
from lora_build.naming import Names, Parameter, Part, is_conv1d
from lora_build.operations import Copy, Merge, Operation, cut
from lora_build.peft_layers import as_in_peft, check_whole, dtypes_in_peft, refuse_adapter
from lora_build.recipe import DType, Numerics, Recipe, Tied
from lora_build.replication import replicate, replication_of
from lora_build.tying import Knots, same_parameter

FLOATS = {"F64", "F32", "F16", "BF16"}
_MERGEABLE = {"F32", "F16", "BF16"}
_DTYPE_NAMES = {DType.float32: "F32", DType.float16: "F16", DType.bfloat16: "BF16"}


@dataclass
class Draft:
    """The plan while adapters are added to it.

    Attributes:
        recipe: what is built.
        base: on what.
        digests: the SHA-256 of what adapters replace whole, by (adapter, key).
        sources: what each output tensor begins as.
        homes: the base's file that each output tensor belongs to.
        placed: the updates of each output tensor, each with the stored rows [start, stop) that it is of.
        columns: the width of each output tensor that has updates.
        replaced: the adapter that replaces a tensor, or rows of it.
        issues: what is wrong.
        notes: what a user should know.
        config_changes: top-level keys of config.json that get another value.
        tokenizer: the adapter whose tokenizer goes along, if any.
    """

    recipe: Recipe
    base: Checkpoint
    adapters: tuple[Adapter, ...]
    digests: Mapping[tuple[str, str], str]
    sources: dict[str, TensorInfo] = field(init=False)
    homes: dict[str, str] = field(init=False)
    placed: dict[str, list[tuple[int, int, Update]]] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    issues: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    config_changes: dict[str, Any] = field(default_factory=dict)
    tokenizer: Adapter | None = None
    _dtypes: dict[str, str] = field(init=False)
    _config: Mapping[str, Any] = field(init=False)
    _names: Names = field(init=False)
    _knots: Knots = field(init=False)
    _frozen: dict[str, tuple[str, str]] = field(default_factory=dict)
    _parts: dict[str, Parts] = field(default_factory=dict)
    _regrown: dict[str, str] = field(default_factory=dict)
    _tied_through: dict[str, str] = field(default_factory=dict)
    _in_peft: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sources = dict(self.base.tensors)
        self.homes = {name: tensor.file for name, tensor in self.base.tensors.items()}
        layers, problems = replication_of(self.adapters)
        self.issues += problems
        if layers:
            try:
                self.sources, self.homes, self.config_changes = replicate(self.base.config, self.sources, layers)
            except PlanError as error:
                self.issues += error.issues
        self._dtypes = {name: tensor.dtype for name, tensor in self.sources.items()}
        self._config = {**self.base.config, **self.config_changes}
        self._names = Names(self._config, {name: t.shape for name, t in self.sources.items()})
        self._knots = Knots(self._config, self._names)
        for adapter in self.adapters:
            self._read(adapter)
        for adapter in self.adapters:
            self._add_whole_tensors(adapter)
        for adapter in self.adapters:
            self._add_updates(adapter)
        self._check_vocabulary()
        self._check_conflicts()
        if self._knots.problem:
            self.issues.append(self._knots.problem)
        if self._repeats_peft:
            self._take_dtypes_of_peft()

    def _take_dtypes_of_peft(self) -> None:
        floats = {name: self._dtypes[name] for name in self.sources if self._dtypes[name] in FLOATS}
        self._in_peft, problems = dtypes_in_peft(_DTYPE_NAMES.get(self.recipe.dtype), floats, self._names.in_float32)
        self.issues += problems
        wanted = _DTYPE_NAMES.get(self.recipe.dtype)
        widened = [name for name, dtype in self._in_peft.items() if dtype == "F32" != (wanted or floats[name])]
        if widened:
            self.notes.append(f"{widened[0]} becomes F32, as transformers keeps it ({len(widened)} such tensors)")

    @property
    def _repeats_peft(self) -> bool:
        return self.recipe.numerics is Numerics.peft

    def _read(self, adapter: Adapter) -> None:
        """Sort an adapter's tensors, or report why it cannot be merged."""
        method = methods().get(adapter.peft_type)
        if method is None:
            self.issues.append(f"{adapter.source}: peft_type {adapter.peft_type} {unmergeable(adapter.peft_type)}")
            return
        problems = method.check_config(adapter.config)
        self.issues += [f"{adapter.source}/adapter_config.json: {problem}" for problem in problems]
        if self._repeats_peft:
            self.issues += refuse_adapter(adapter)
        parts = sort_tensors(
            adapter,
            method.leaves,
            shared_leaves=getattr(method, "shared_leaves", ()),
            ignored=getattr(method, "ignored", ()),
        )
        self.issues += parts.problems
        if parts.ignored:
            self.notes.append(
                f"{adapter.source}: {len(parts.ignored)} tensors were for training only, such as {parts.ignored[0]}"
            )
        if not problems:
            self._parts[adapter.name] = parts

    def _add_whole_tensors(self, adapter: Adapter) -> None:
        parts = self._parts.get(adapter.name, Parts())
        for parameter, tensor in parts.frozen.items():
            self._freeze(adapter, parameter, tensor)
        for parameter, tensor in parts.replaced.items():
            for copy in parts.copies.get(parameter, ()):
                if self.digests[adapter.name, copy.name] != self.digests[adapter.name, tensor.name]:
                    self.issues.append(
                        f"{adapter.source}: '{tensor.name}' and '{copy.name}' both replace {parameter} and differ; "
                        "delete the one that is not meant"
                    )
            self._replace(adapter, parameter, tensor)

    def _freeze(self, adapter: Adapter, parameter: str, tensor: TensorInfo) -> None:
        found = self._find(adapter, parameter, tied=True)
        if found is None:
            return
        digest = self.digests[adapter.name, tensor.name]
        name = found.parts[0].name
        owner, other = self._frozen.setdefault(name, (adapter.name, digest))
        if other != digest:
            self.issues.append(
                f"{adapter.source}: '{tensor.name}' and the one of adapter {owner} differ: "
                "they were trained on different bases"
            )
        self.notes.append(f"{name} comes from adapter {adapter.name}, which saved its base's along")
        self._put(adapter, found, tensor)

    def _replace(self, adapter: Adapter, parameter: str, tensor: TensorInfo) -> None:
        if adapter.weight != 1:
            self.issues.append(
                f"{adapter.source}: has weight {adapter.weight!r}, but it replaces {parameter} whole, "
                "which cannot be weighted; set its weight to 1"
            )
        found = self._find(adapter, parameter, value=self.digests[adapter.name, tensor.name])
        if found is None:
            return
        names = [part.name for part in found.parts]
        owner = self.replaced.get(names[0], adapter.name)
        winner = self.recipe.modules_to_save
        if owner != adapter.name and winner not in (owner, adapter.name):
            self.issues.append(
                f"adapters {owner} and {adapter.name} both replace {names[0]}; say which one's to take: "
                f"modules_to_save: {adapter.name}, or merge only one of them"
            )
        if owner == adapter.name or winner == adapter.name:
            self.replaced |= dict.fromkeys(names, adapter.name)
            self._put(adapter, found, tensor)

    def _put(self, adapter: Adapter, parameter: Parameter, tensor: TensorInfo) -> None:
        """Let a tensor of an adapter take the place of a parameter, wherever it lies on disk."""
        stored = {self.sources[part.name].dtype for part in parameter.parts}
        if tensor.dtype not in FLOATS and {tensor.dtype} != stored:
            expected = sorted(FLOATS) if stored <= FLOATS else sorted(stored)
            self.issues.append(f"{adapter.source}: '{tensor.name}' is {tensor.dtype}, expected one of {expected}")
            return
        if tensor.shape != parameter.shape and not self._regrow(adapter, parameter, tensor):
            self.issues.append(
                f"{adapter.source}: '{tensor.name}' is {list(tensor.shape)}, the base's {parameter.name} is "
                f"{list(parameter.shape)}; was it trained on another base?"
            )
            return
        for part in parameter.parts:
            disk = self.sources[part.name]
            if (part.expert, part.rows, part.transposed) == (None, None, False):
                self.sources[part.name] = tensor
            elif part.transposed or (rows := _contiguous(part, disk)) is None:
                self.issues.append(
                    f"{adapter.source}: replaces {parameter.name} whole, which the base stores in another order"
                )
            elif len(rows) == disk.shape[0]:
                self.sources[part.name] = replace(_rows_of(tensor, part.expert, rows), shape=disk.shape)
            else:
                whole = replacement(adapter.name, _rows_of(tensor, part.expert, rows), None)
                self._place(part.name, part.first, part.first + len(rows), whole, _width(disk))

    def _regrow(self, adapter: Adapter, parameter: Parameter, tensor: TensorInfo) -> bool:
        """Whether a tensor is the parameter with another vocabulary, which is then noted."""
        old, new = parameter.shape, tensor.shape
        if len(old) != len(new) or old[1:] != new[1:] or old[:1] != (self._vocab_size(),) or len(parameter.parts) != 1:
            return False
        self._regrown[parameter.parts[0].name] = adapter.name
        self.tokenizer = adapter if adapter.tokenizer_files else self.tokenizer
        return True

    def _vocab_size(self) -> int | None:
        text = self._config.get("text_config")
        found = self._config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
        return found if isinstance(found, int) else None

    def _add_updates(self, adapter: Adapter) -> None:
        parts = self._parts.get(adapter.name)
        if parts is None:
            return
        method = methods()[adapter.peft_type]
        # training changed alike all that share a tensor: with ensure_weight_tying, and where tokens of an input
        # embedding alone were trained (peft/utils/other.py set_additional_trainable_modules)
        twins = self._knots.twins(adapter, parts, self.digests)
        copies = {copy for others in twins.values() for copy in others}
        if copies and self._repeats_peft:
            self.issues.append(
                f"{adapter.source}: adapts tied modules alike (ensure_weight_tying), of which peft merges each one's "
                "update into the tensor that they share; set numerics: exact"
            )
        for module, factors in parts.factors.items():
            if module not in copies:
                self._update(adapter, method, module, factors, parts, keep_tied=module in twins)
        for module, tensor in parts.tokens.items():
            keep_tied = self._knots.is_root(module, others=parts.tokens.keys() - {module})
            leaf = TrainableTokens.leaves[0]
            self._update(adapter, TrainableTokens(), module, {leaf: tensor}, parts, keep_tied=keep_tied)

    def _update(
        self,
        adapter: Adapter,
        method: Method,
        module: str,
        factors: Mapping[str, TensorInfo],
        parts: Parts,
        *,
        keep_tied: bool,
    ) -> None:
        base = _Module(self, adapter, module, keep_tied)
        layer = Layer(
            adapter=adapter.name,
            module=module,
            config=adapter.config,
            adapter_weight=adapter.weight,
            factors=factors,
            base=base,
            wrapped=module in parts.wrapped,
            shared=parts.shared,
            expert_packing=adapter.expert_packing,
        )
        updates, problems = method.updates(layer)
        if base.is_missing:
            self.issues.append(self._missing(adapter, f"{module}.weight"))
            return
        self.issues += problems
        for leaf, update in updates.items():
            parameter = base.find(leaf)
            assert parameter is not None, "a method updates what it found"
            self._spread(parameter, self._as_in_peft(layer, leaf, update, parameter) if self._repeats_peft else update)

    def _as_in_peft(self, layer: Layer, leaf: str, update: Update, parameter: Parameter) -> Update:
        """Return an update as peft merges it, and report why that is not repeated where it is not."""
        name = parameter.parts[0].name
        if self._knots.shared(f"{layer.module}.{leaf}"):
            first = self._tied_through.setdefault(name, layer.module)
            if first != layer.module:
                self.issues.append(
                    f"{layer.where}: shares {name} with {first}, and both are adapted: peft merges all adapters of one "
                    "module before those of the next; set numerics: exact"
                )
        elif _is_plain(parameter) and not self._names.is_in_memory(name):
            self.issues.append(
                f"{layer.where}: {name} is only a part of a parameter in memory, where peft puts several of the "
                "adapter's factors together, or none; set numerics: exact"
            )
        repeated = as_in_peft(layer, leaf, update)
        if isinstance(repeated, str):
            self.issues.append(repeated)
            return update
        return repeated

    def _spread(self, parameter: Parameter, update: Update) -> None:
        """Place an update of a parameter on every disk tensor that holds some of it."""
        if "offset" in update.options and self._knots.shared(parameter.name):
            self.issues.append(
                f"{parameter.name}: adapter {update.adapter} began by changing it, and with it all that share it; "
                "convert the adapter to plain LoRA (peft: path_initial_model_for_weight_conversion)"
            )
        for part in parameter.parts:
            disk = self.sources[part.name]
            turned = update.transposed != part.transposed
            if update.whole and part.rows is not None:
                self.issues.append(
                    f"{parameter.name}: adapter {update.adapter} needs all of it at once, the base's {part.name} holds "
                    "only some of its rows"
                )
                return
            matrix = disk.shape[-2:] if update.stacked or part.expert is not None else (disk.shape or (1,))
            stop = part.first + (matrix[0] if part.rows is None else len(part.rows))
            here = replace(update, transposed=turned, rows=part.rows, expert=part.expert)
            experts = range(disk.shape[0]) if update.stacked and part.expert is None else range(1)
            for expert in experts:
                above = expert * matrix[0]
                mine = replace(here, expert=expert) if update.stacked and part.expert is None else here
                width = matrix[-1] if update.stacked else _width(disk)
                self._place(part.name, above + part.first, above + stop, mine, width)

    def _place(self, name: str, start: int, stop: int, update: Update, columns: int) -> None:
        if self.columns.setdefault(name, columns) != columns:
            self.issues.append(f"{name}: one adapter updates it as a stack of matrices and another one as one")
            return
        self.placed.setdefault(name, []).append((start, stop, update))
        for tensor in (self.sources[name], *update.factors.values()):
            if tensor.dtype not in _MERGEABLE and not (tensor.dtype == "F64" and tensor.source != "base"):
                self.issues.append(f"{tensor.source}: {tensor.name} is {tensor.dtype}; merging needs F32, F16 or BF16")

    def find(self, adapter: Adapter, parameter: str, *, keep_tied: bool, value: str | None = None) -> Parameter | None:
        """Return the parameter that an adapter names, cutting a tie where it has to be cut for it."""
        if not self._knots.shared(parameter):
            found = self._names.find(parameter)
            return replace(found, shape=self.sources[found.parts[0].name].shape) if found and _is_plain(found) else found
        if not keep_tied and not self._agree(adapter, parameter, value):
            self._untie(parameter, replaces=value is not None)
        name = self._knots.name(parameter)
        return Parameter(name=name, shape=self.sources[name].shape, parts=(Part(name=name),))

    def _agree(self, adapter: Adapter, parameter: str, value: str | None) -> bool:
        """Whether an adapter replaces all that share a tensor by one value."""
        replaced = self._parts[adapter.name].replaced
        values = {
            next((self.digests[adapter.name, t.name] for p, t in replaced.items() if same_parameter(p, member)), None)
            for member in self._knots.members(parameter)
        }
        return value is not None and values == {value}

    def _untie(self, parameter: str, *, replaces: bool) -> None:
        """Give a tied parameter a tensor of its own, unless the recipe says otherwise or nothing can."""
        member, others = self._knots.member(parameter), ", ".join(self._knots.others(parameter))
        name = self._knots.name(parameter)
        if self.recipe.tied is Tied.error:
            self.issues.append(
                f"base: {member} is tied to {others}, an adapter changes it, and the recipe says tied: error"
            )
        elif self.recipe.tied is Tied.peft and not replaces:
            self.notes.append(
                f"{member} is tied: its update goes into {name} and so into all that share it (tied: peft)"
            )
        elif bound := self._knots.bound(parameter):
            self.issues.append(
                f"base: {member} shares its tensor with {', '.join(bound)} whatever tie_word_embeddings says, "
                "so an update to it alone cannot be kept apart; set tied: peft to share it"
            )
        else:
            self.config_changes |= self._knots.cut()
            for new, root in self._knots.cut_names().items():
                if new not in self.sources:
                    self.sources[new] = self.sources[root]
                    self.homes[new], self._dtypes[new] = self.homes[root], self._dtypes[root]
                    self.notes.append(
                        f"{new} is written beside {root}: an adapter changes one of the two, which were tied"
                    )

    def _find(
        self, adapter: Adapter, parameter: str, *, tied: bool = False, value: str | None = None
    ) -> Parameter | None:
        """Return the parameter that a whole tensor is of, adding a head where it is a new one; report what is missing."""
        found = self.find(adapter, parameter, keep_tied=tied, value=value)
        if found is None and value is not None and self._add_head(adapter):
            found = self.find(adapter, parameter, keep_tied=tied, value=value)
        if found is None:
            self.issues.append(self._missing(adapter, parameter))
        return found

    def _add_head(self, adapter: Adapter) -> bool:
        """Give the model the head that an adapter was trained with, once; whether it has another one than the base."""
        head = head_of(self._config, adapter.config, self._parts[adapter.name].replaced, self.sources)
        if head is None:
            return False
        self.issues += head.problems
        self.config_changes |= head.config_changes
        for name in head.dropped:
            del self.sources[name]
            del self.homes[name]
        for name, tensor in head.added.items():
            self.sources[name] = tensor
            self.homes[name] = self.base.shards[-1]
            self._dtypes[name] = max(stored := list(self._dtypes.values()), key=stored.count)
        self.notes += head.notes
        self._config = {**self._config, **head.config_changes}
        self._names = Names(self._config, {name: t.shape for name, t in self.sources.items()})
        self._knots = Knots(self._config, self._names)
        return True

    def _missing(self, adapter: Adapter, parameter: str) -> str:
        reason = self._names.unsupported(parameter)
        return f"{adapter.source}: adapts '{parameter}', which the base does not have" + (
            f" ({reason})" if reason else self._names.nearest(parameter)
        )

    def module_kind(self, module: str) -> str | None:
        """Return the class of a module where the config alone, or else transformers, tells it."""
        known = is_conv1d(self._config, module)
        return None if known is None else "Conv1D" if known else "Linear"

    def module_settings(self, parameter: str) -> dict[str, Any]:
        """Return what the class of a parameter's module fixes; see `BaseModule.settings`."""
        found = self._names.module(parameter)
        if found is None:
            return {}
        return {
            "dilation": found.dilation,
            "groups": found.groups,
            "parameters": found.parameters,
            "is_transposed": found.is_transposed,
        }

    def _check_vocabulary(self) -> None:
        if self._regrown:
            changes, problems = vocabulary_changes(self._config, self.sources, self._regrown)
            self.config_changes |= changes
            self.issues += problems
            if self.tokenizer is None:
                owner = next(iter(self._regrown.values()))
                self.notes.append(
                    f"the vocabulary is that of adapter {owner}, which brings no tokenizer: check the base's"
                )

    def _check_conflicts(self) -> None:
        """Report what two adapters do to one tensor and nobody can say in which order."""
        for name, placed in sorted(self.placed.items()):
            names = {update.adapter for _, _, update in placed}
            owner = self.replaced.get(name)
            for other in sorted(names - {owner}) if owner else ():
                self.issues.append(f"adapter {owner} replaces {name} and adapter {other} updates it; merge only one")
            if len({update.method for _, _, update in placed}) > 1:
                self.issues.append(f"{name}: adapters of different methods update it; merge them one after another")
            if any(u.ordered for _, _, u in placed) and any("offset" in u.options for _, _, u in placed):
                self.issues.append(f"{name}: DoRA cannot be composed with an adapter that began by changing the base")
            self._check_tokens(name, [update for _, _, update in placed if "indices" in update.options])

    def _check_tokens(self, name: str, updates: list[Update]) -> None:
        trained: dict[int, str] = {}
        for update in updates:
            for token in update.options["indices"] or ():
                owner = trained.setdefault(token, update.adapter)
                if owner != update.adapter:
                    self.issues.append(
                        f"adapters {owner} and {update.adapter} both train token {token} of {name}; merge only one of them"
                    )
                    return

    def operations(self) -> list[Operation]:
        """Return what happens to each output tensor, in the order of the base's files."""
        order = {file: place for place, file in enumerate(self.base.shards)}
        starts = {name: self.base.tensors[name].start for name in self.sources.keys() & self.base.tensors.keys()}
        names = sorted(self.sources, key=lambda n: (order[self.homes[n]], starts.get(n, 0), n))
        return [self._operation(name) for name in names]

    def _operation(self, name: str) -> Operation:
        source = self.sources[name]
        stored = self._dtypes.get(name, source.dtype)
        wanted = _DTYPE_NAMES.get(self.recipe.dtype)
        if wanted and stored.startswith("F8"):
            self.issues.append(f"base: {name} is {stored}; such a base cannot be converted, set dtype: keep")
        dtype = self._in_peft.get(name, wanted if wanted and stored in FLOATS else stored)
        placed = self.placed.get(name)
        if not placed:
            return Copy(name=name, dtype=dtype, source=source)
        merge = Merge(name=name, dtype=dtype, source=source, columns=self.columns[name], segments=cut(placed))
        if self._repeats_peft:
            self.issues += check_whole(name, merge.segments)
        return merge


@dataclass
class _Module:
    """A module of the base, as a method sees it (`BaseModule`)."""

    draft: Draft
    adapter: Adapter
    module: str
    keep_tied: bool
    is_missing: bool = False
    _found: dict[str, Parameter | None] = field(default_factory=dict)

    def find(self, parameter: str) -> Parameter | None:
        """Return a parameter of the module."""
        if parameter not in self._found:
            path = f"{self.module}.{parameter}"
            self._found[parameter] = self.draft.find(self.adapter, path, keep_tied=self.keep_tied)
        self.is_missing = not any(self._found.values())
        return self._found[parameter]

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter in memory."""
        found = self.find(parameter)
        return found.shape if found else None

    @property
    def kind(self) -> str | None:
        """Return the module's class."""
        return self.draft.module_kind(self.module)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return what the module's class fixes."""
        name = next((f"{self.module}.{leaf}" for leaf, found in self._found.items() if found), f"{self.module}.weight")
        return self.draft.module_settings(name)


def unmergeable(peft_type: str) -> str:
    """Return why adapters of a type cannot be merged, for a message."""
    if reason := _NO_WEIGHTS.get(peft_type):
        return f"cannot be merged: {reason}"
    return f"cannot be merged; known: {', '.join(sorted(methods()))}{did_you_mean(peft_type, methods())}"


_PROMPTS = "it adds virtual tokens to the input and changes no weight"
_NO_WEIGHTS = {
    "PROMPT_TUNING": _PROMPTS,
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "PREFIX_TUNING": "it adds keys and values to the attention and changes no weight",
    "CPT": _PROMPTS,
    "CARTRIDGE": "it adds keys and values to the attention and changes no weight",
    "ADAPTION_PROMPT": "it adds prompts to the attention and changes no weight",
    "XLORA": "it mixes adapters by the input, so no weight can hold it",
    "POLY": "it mixes adapters by the task at run time, so no weight can hold it",
    "LILY": "it routes by the input, so no weight can hold it",
}


def _is_plain(parameter: Parameter) -> bool:
    """Whether one tensor on disk is the parameter as it is in memory."""
    return parameter.parts == (Part(name=parameter.parts[0].name),) and len(parameter.shape) <= 4


def _contiguous(part: Part, disk: TensorInfo) -> range | None:
    """Return the parameter's rows that a disk tensor holds if they follow each other."""
    if part.rows is None:
        return range(disk.shape[0])
    if isinstance(part.rows, range) and part.rows.step == 1:
        return part.rows
    return None


def _rows_of(tensor: TensorInfo, expert: int | None, rows: range) -> TensorInfo:
    """Return some rows of a tensor, or of one matrix of a stack, as a tensor."""
    num_rows = tensor.shape[0] if expert is None else tensor.shape[1]
    inner = tensor.shape[1:] if expert is None else tensor.shape[2:]
    width = DTYPE_BYTES[tensor.dtype]
    for size in inner:
        width *= size
    first = (expert or 0) * num_rows + rows.start
    start = tensor.start + first * width
    return replace(tensor, shape=(len(rows), *inner), start=start, end=start + len(rows) * width)


def _width(tensor: TensorInfo) -> int:
    """Return the columns of a tensor seen as a matrix of its first dimension; a vector is a column."""
    return tensor.num_elements // tensor.shape[0] if tensor.shape and tensor.shape[0] else 1
