"""The draft of a plan: what adapters do to each tensor of the output, and all that is wrong so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora_build.dtypes import FLOATS, MERGEABLE, named, num_bytes
from lora_build.files.formats.adapter import Adapter, Parts, sort_tensors
from lora_build.files.formats.checkpoint import Checkpoint
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.identity import Digest, TensorKey
from lora_build.methods.interface import AdaptedModule, Method, PeftLayer, PlacedUpdate, Update, methods, unmergeable
from lora_build.methods.trainable_tokens import TrainableTokens, replacement
from lora_build.models.layer_replication import replication_of
from lora_build.models.parameters import Parameter, Part
from lora_build.models.tied_weights import same_parameter
from lora_build.planning.layout import Layout, is_plain
from lora_build.planning.operations import Merge, Operation, cut, taken
from lora_build.planning.peft_compat import as_in_peft, check_whole, dtypes_in_peft, refuse_adapter
from lora_build.recipe.schema import Numerics, Recipe


@dataclass
class Draft:
    """The plan while adapters are added to it.

    Attributes:
        recipe: what is built.
        base: on what.
        adapters: of what.
        digests: the SHA-256 of what adapters replace whole, by (adapter, key).
        cut_first: whether ties are cut before any adapter is added, so that what is meant for all that shared a tensor
            goes to each of them.
        layout: the output's tensors.
        placed: the updates of each output tensor.
        columns: the width of each output tensor that has updates.
        replaced: the adapter that replaces a tensor, or rows of it.
        issues: what is wrong.
        notes: what a user should know.
    """

    recipe: Recipe
    base: Checkpoint
    adapters: tuple[Adapter, ...]
    digests: Mapping[TensorKey, Digest]
    cut_first: bool = False
    layout: Layout = field(init=False)
    placed: dict[str, list[PlacedUpdate]] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    issues: list[str] = field(init=False)
    notes: list[str] = field(init=False)
    _frozen: dict[str, tuple[str, str]] = field(default_factory=dict)
    _parts: dict[str, Parts] = field(default_factory=dict)
    _tied_through: dict[str, str] = field(default_factory=dict)
    _in_peft: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers, problems = replication_of(self.adapters)
        self.layout = Layout(self.base, self.recipe.tied_embeddings, layers)
        self.issues, self.notes = self.layout.issues, self.layout.notes  # one account, in the order of discovery
        self.issues += problems
        if self.cut_first:
            self.layout.cut_ties()
        for adapter in self.adapters:
            self._read(adapter)
        for adapter in self.adapters:
            self._add_whole_tensors(adapter)
        for adapter in self.adapters:
            self._add_updates(adapter)
        self.layout.finish()
        self._check_conflicts()
        if self._repeats_peft:
            self._take_dtypes_of_peft()

    def _take_dtypes_of_peft(self) -> None:
        dtypes, wanted = self.layout.dtypes, named(self.recipe.dtype.value)
        floats = {name: dtypes[name] for name in self.layout.sources if dtypes[name] in FLOATS}
        self._in_peft, problems = dtypes_in_peft(wanted, floats, self.layout.names.in_float32)
        self.issues += problems
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
                if self._digest(adapter, copy) != self._digest(adapter, tensor):
                    self.issues.append(
                        f"{adapter.source}: '{tensor.name}' and '{copy.name}' both replace {parameter} and differ; "
                        "delete the one that is not meant"
                    )
            self._replace(adapter, parameter, tensor)

    def _digest(self, adapter: Adapter, tensor: TensorInfo) -> Digest:
        return self.digests[TensorKey(adapter.name, tensor.name)]

    def _freeze(self, adapter: Adapter, parameter: str, tensor: TensorInfo) -> None:
        found = self._find(adapter, parameter)
        if found is None:
            return
        digest = self._digest(adapter, tensor)
        name = found.parts[0].name
        owner, other = self._frozen.setdefault(name, (adapter.name, digest))
        if other != digest:
            self.issues.append(
                f"{adapter.source}: '{tensor.name}' and the one of adapter {owner} differ: "
                "they were trained on different bases"
            )
        self.notes.append(f"{name} comes from adapter {adapter.name}, which saved its base's along")
        # a tie that has been cut was whole in training: what the base had there, all had
        new = self.layout.tied_weights.cut_names() if self.layout.tied_weights.is_cut else {}
        root = new.get(name, name)
        for other in (root, *(n for n, r in new.items() if r == root)):
            plain = found if other == name else replace(found, name=other, parts=(Part(name=other),))
            self._put(adapter, plain, tensor)

    def _replace(self, adapter: Adapter, parameter: str, tensor: TensorInfo) -> None:
        if adapter.weight != 1:
            self.issues.append(
                f"{adapter.source}: has weight {adapter.weight!r}, but it replaces {parameter} whole, "
                "which cannot be weighted; set its weight to 1"
            )
        if self._find(adapter, parameter) is None:
            return
        if not self._agree(adapter, parameter):
            self.layout.give_own_tensor(parameter, replaces=True)
        found = self.layout.look(parameter)
        assert found is not None
        names = [part.name for part in found.parts]
        owner = self.replaced.get(names[0], adapter.name)
        winner = self.recipe.saved_modules_from
        if owner != adapter.name and winner not in (owner, adapter.name):
            self.issues.append(
                f"adapters {owner} and {adapter.name} both replace {names[0]}; say which one's to take: "
                f"saved_modules_from: {adapter.name}, or merge only one of them"
            )
        if owner == adapter.name or winner == adapter.name:
            self.replaced |= dict.fromkeys(names, adapter.name)
            self._put(adapter, found, tensor)

    def _put(self, adapter: Adapter, parameter: Parameter, tensor: TensorInfo) -> None:
        """Let a tensor of an adapter take the place of a parameter, wherever it lies on disk."""
        stored = {self.layout.sources[part.name].dtype for part in parameter.parts}
        if tensor.dtype not in FLOATS and {tensor.dtype} != stored:
            expected = sorted(FLOATS) if stored <= FLOATS else sorted(stored)
            self.issues.append(f"{adapter.source}: '{tensor.name}' is {tensor.dtype}, expected one of {expected}")
            return
        if tensor.shape != parameter.shape and not self.layout.regrow(adapter, parameter, tensor.shape):
            self.issues.append(
                f"{adapter.source}: '{tensor.name}' is {list(tensor.shape)}, the base's {parameter.name} is "
                f"{list(parameter.shape)}; was it trained on another base?"
            )
            return
        for part in parameter.parts:
            disk = self.layout.sources[part.name]
            if (part.expert, part.rows, part.transposed) == (None, None, False):
                self.layout.sources[part.name] = tensor
            elif part.transposed or (rows := _contiguous(part, disk)) is None:
                self.issues.append(
                    f"{adapter.source}: replaces {parameter.name} whole, which the base stores in another order"
                )
            elif len(rows) == disk.shape[0]:
                self.layout.sources[part.name] = replace(_rows_of(tensor, part.expert, rows), shape=disk.shape)
            else:
                whole = replacement(adapter.name, _rows_of(tensor, part.expert, rows), range(len(rows)))
                placed = PlacedUpdate(update=whole, start=part.first, stop=part.first + len(rows))
                self._place(part.name, placed, _width(disk))

    def _add_updates(self, adapter: Adapter) -> None:
        parts = self._parts.get(adapter.name)
        if parts is None:
            return
        method = methods()[adapter.peft_type]
        # training changed alike all that share a tensor: with ensure_weight_tying, and where tokens of an input
        # embedding alone were trained (peft/utils/other.py set_additional_trainable_modules)
        twins = self.layout.tied_weights.twins(adapter, parts, self.digests)
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
            keep_tied = self.layout.tied_weights.is_root(module, others=parts.tokens.keys() - {module})
            leaf = TrainableTokens.leaves[0]
            if keep_tied:
                self._check_biases(adapter, module)
            self._update(adapter, TrainableTokens(), module, {leaf: tensor}, parts, keep_tied=keep_tied)

    def _check_biases(self, adapter: Adapter, module: str) -> None:
        """Report a tied head with a bias, which peft leaves out of it while tokens are trained."""
        for member in self.layout.tied_weights.others(f"{module}.weight"):
            if self.layout.look(bias := member.removesuffix("weight") + "bias"):
                self.issues.append(
                    f"{adapter.source}: trains tokens of {module}, and while it trains, peft leaves out {bias} of the "
                    "head that is tied to it; untie the base first"
                )

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
        base = _Module(self.layout, module)
        adapted = AdaptedModule(
            adapter=adapter.name,
            path=module,
            config=adapter.config,
            adapter_weight=adapter.weight,
            factors=factors,
            base=base,
            wrapped=module in parts.wrapped,
            shared=parts.shared,
            expert_packing=adapter.expert_packing,
        )
        updates, problems = method.updates(adapted)
        if base.is_missing:
            self.issues.append(f"{adapter.source}: {self.layout.missing(f'{module}.weight')}")
            return
        self.issues += problems
        for leaf, update in updates.items():
            path = f"{module}.{leaf}"
            is_own = not keep_tied and self.layout.give_own_tensor(path, replaces=False)
            found = self.layout.look(path)
            assert found is not None, "a method updates what it found"
            for parameter in [found] if is_own else self.layout.look_all(path):
                if self._repeats_peft:
                    self._spread(parameter, *self._as_in_peft(adapted, leaf, update, parameter))
                else:
                    self._spread(parameter, update)

    def _as_in_peft(
        self, module: AdaptedModule, leaf: str, update: Update, parameter: Parameter
    ) -> tuple[Update, PeftLayer | None]:
        """Return an update as peft merges it and the layer that does, and report why that is not repeated."""
        name = parameter.parts[0].name
        if self.layout.tied_weights.shared(f"{module.path}.{leaf}"):
            first = self._tied_through.setdefault(name, module.path)
            if first != module.path:
                self.issues.append(
                    f"{module.where}: shares {name} with {first}, and both are adapted: peft merges all adapters of "
                    "one module before those of the next; set numerics: exact"
                )
        elif is_plain(parameter) and not self.layout.names.is_in_memory(name):
            self.issues.append(
                f"{module.where}: {name} is only a part of a parameter in memory, where peft puts several of the "
                "adapter's factors together, or none; set numerics: exact"
            )
        repeated = as_in_peft(module, leaf, update)
        if isinstance(repeated, str):
            self.issues.append(repeated)
            return update, None
        return repeated

    def _spread(self, parameter: Parameter, update: Update, peft: PeftLayer | None = None) -> None:
        """Place an update of a parameter on every disk tensor that holds some of it."""
        if update.decomposes_base and self.layout.tied_weights.shared(parameter.name):
            self.issues.append(
                f"{parameter.name}: adapter {update.adapter} began by changing it, and with it all that share it; "
                "convert the adapter to plain LoRA where peft can (path_initial_model_for_weight_conversion)"
            )
        for part in parameter.parts:
            disk = self.layout.sources[part.name]
            turned = update.transposed != part.transposed
            if update.whole and part.rows is not None:
                self.issues.append(
                    f"{parameter.name}: adapter {update.adapter} needs all of it at once, the base's {part.name} holds "
                    "only some of its rows"
                )
                return
            is_stack, in_one_stack = update.stack is not None, update.stack is not None and part.expert is None
            matrix = disk.shape[-2:] if is_stack or part.expert is not None else (disk.shape or (1,))
            stop = part.first + (matrix[0] if part.rows is None else len(part.rows))
            for number in range(disk.shape[0] if in_one_stack else 1):
                above = number * matrix[0]
                placed = PlacedUpdate(
                    update=update, start=above + part.first, stop=above + stop, rows=part.rows,
                    expert=number if in_one_stack else part.expert, transposed=turned, peft=peft,
                )  # fmt: skip
                self._place(part.name, placed, matrix[-1] if is_stack else _width(disk))

    def _place(self, name: str, update: PlacedUpdate, columns: int) -> None:
        if self.columns.setdefault(name, columns) != columns:
            self.issues.append(f"{name}: one adapter updates it as a stack of matrices and another one as one")
            return
        self.placed.setdefault(name, []).append(update)
        for tensor in (self.layout.sources[name], *update.factors.values()):
            if tensor.dtype not in MERGEABLE and not (tensor.dtype == "F64" and not tensor.source.is_base):
                self.issues.append(f"{tensor.source}: {tensor.name} is {tensor.dtype}; merging needs F32, F16 or BF16")

    def _find(self, adapter: Adapter, parameter: str) -> Parameter | None:
        """Return the parameter that a whole tensor is of, adding a head where it is new; report what is missing."""
        found = self.layout.look(parameter)
        if found is None and self.layout.add_head(adapter, self._parts[adapter.name].replaced):
            found = self.layout.look(parameter)
        if found is None:
            self.issues.append(f"{adapter.source}: {self.layout.missing(parameter)}")
        return found

    def _agree(self, adapter: Adapter, parameter: str) -> bool:
        """Whether an adapter replaces all that share a tensor by one value."""
        if not self.layout.tied_weights.shared(parameter):
            return True
        replaced = self._parts[adapter.name].replaced
        values = {
            next((self._digest(adapter, t) for p, t in replaced.items() if same_parameter(p, member)), None)
            for member in self.layout.tied_weights.members(parameter)
        }
        return len(values) == 1 and None not in values

    def _check_conflicts(self) -> None:
        """Report what two adapters do to one tensor and nobody can say in which order."""
        for name, placed in sorted(self.placed.items()):
            names = {update.adapter for update in placed}
            owner = self.replaced.get(name)
            for other in sorted(names - {owner}) if owner else ():
                self.issues.append(f"adapter {owner} replaces {name} and adapter {other} updates it; merge only one")
            if len({update.method for update in placed}) > 1:
                self.issues.append(
                    f"{name}: adapters of different methods update it; merge them one after another: two recipes, the "
                    "second on the output of the first, or two merge_and_unload()"
                )
            if any(u.update.ordered for u in placed) and any(u.update.decomposes_base for u in placed):
                self.issues.append(f"{name}: DoRA cannot be composed with an adapter that began by changing the base")
            self._check_tokens(name, placed)

    def _check_tokens(self, name: str, updates: list[PlacedUpdate]) -> None:
        trained: dict[int, str] = {}
        for update in updates:
            tokens = update.update.tokens or ()
            for token in () if isinstance(tokens, range) else tokens:
                owner = trained.setdefault(token, update.adapter)
                if owner != update.adapter:
                    both = f"adapters {owner} and {update.adapter}"
                    self.issues.append(f"{both} both train token {token} of {name}; merge only one of them")
                    return

    def operations(self) -> list[Operation]:
        """Return what happens to each output tensor, in the order of the base's files."""
        order = {file: place for place, file in enumerate(self.base.shards)}
        starts = {name: self.base.tensors[name].start for name in self.layout.sources.keys() & self.base.tensors.keys()}
        names = sorted(self.layout.sources, key=lambda n: (order[self.layout.homes[n]], starts.get(n, 0), n))
        return [self._operation(name) for name in names]

    def _operation(self, name: str) -> Operation:
        source = self.layout.sources[name]
        stored = self.layout.dtypes.get(name, source.dtype)
        wanted = named(self.recipe.dtype.value)
        if wanted and stored.startswith("F8"):
            self.issues.append(f"base: {name} is {stored}; such a base cannot be converted, set dtype: keep")
        dtype = self._in_peft.get(name, wanted if wanted and stored in FLOATS else stored)
        placed = self.placed.get(name)
        if not placed:
            return taken(name=name, dtype=dtype, source=source)
        merge = Merge(name=name, dtype=dtype, source=source, columns=self.columns[name], segments=cut(placed))
        if self._repeats_peft:
            self.issues += check_whole(name, merge.segments)
        return merge


def make_draft(
    recipe: Recipe, base: Checkpoint, adapters: tuple[Adapter, ...], digests: Mapping[TensorKey, Digest]
) -> Draft:
    """Return the draft of what adapters do to a base; `issues` has what is wrong.

    Whether a tie has to be cut shows while adapters are added. Then they are added anew with the tie cut first.
    """
    draft = Draft(recipe=recipe, base=base, adapters=adapters, digests=digests)
    if draft.layout.tied_weights.is_cut:
        draft = Draft(recipe=recipe, base=base, adapters=adapters, digests=digests, cut_first=True)
    return draft


@dataclass
class _Module:
    """A module of the base, as a method sees it (`BaseModule`)."""

    layout: Layout
    module: str
    _shapes: dict[str, tuple[int, ...] | None] = field(default_factory=dict)

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter in memory."""
        if parameter not in self._shapes:
            found = self.layout.look(f"{self.module}.{parameter}")
            self._shapes[parameter] = found.shape if found else None
        return self._shapes[parameter]

    @property
    def is_missing(self) -> bool:
        """Whether nothing was there that a method asked for."""
        return bool(self._shapes) and all(shape is None for shape in self._shapes.values())

    @property
    def layer_type(self) -> str | None:
        """Return what stores the module's matrices."""
        return self.layout.kind(self.module)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return what the module's class fixes."""
        leaf = next((leaf for leaf, shape in self._shapes.items() if shape), "weight")
        return self.layout.settings(f"{self.module}.{leaf}")


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
    width = num_bytes(tensor.dtype)
    for size in inner:
        width *= size
    first = (expert or 0) * num_rows + rows.start
    start = tensor.start + first * width
    return replace(tensor, shape=(len(rows), *inner), start=start, end=start + len(rows) * width)


def _width(tensor: TensorInfo) -> int:
    """Return the columns of a tensor seen as a matrix of its first dimension; a vector is a column."""
    return tensor.num_elements // tensor.shape[0] if tensor.shape and tensor.shape[0] else 1
