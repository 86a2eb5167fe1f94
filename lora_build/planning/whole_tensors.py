"""Whole tensors: what an adapter brings in place of the base's parameters.

Those that it was trained with (`modules_to_save`, biases, a new head, more tokens) replace the base's. Those that it
only saved along, frozen, are the base's own as they were in training, and all adapters have to agree on them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lora_build.dtypes import FLOATS, num_bytes
from lora_build.files.formats.adapter import Adapter
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.identity import Digest, TensorKey
from lora_build.grading import Layers, factor
from lora_build.methods.interface import PlacedUpdate
from lora_build.methods.trainable_tokens import replacement
from lora_build.models.heads import Head
from lora_build.models.parameters import Parameter, Part
from lora_build.models.tied_weights import same_parameter
from lora_build.planning.adapters import MergeableAdapter
from lora_build.planning.inputs import Inputs
from lora_build.planning.layout import Layout, is_plain
from lora_build.planning.placement import Placements, width
from lora_build.planning.ties import separate
from lora_build.recipe.schema import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeTensors:
    """The output once adapters have brought their whole tensors.

    Attributes:
        layout: with these tensors in it, and a head if one is new.
        placements: those that replace only some rows of a tensor on disk.
        owners: the adapter that replaces a tensor, or rows of it.
        regrown: the tensors that have another vocabulary than the base, each with its adapter.
        must_cut: whether a tie has to be cut for it; the rest says little then.
        issues: what is wrong.
        notes: what a user should know.
    """

    layout: Layout
    placements: Placements
    owners: Mapping[str, str]
    regrown: Mapping[str, str]
    must_cut: bool
    issues: tuple[str, ...]
    notes: tuple[str, ...]


def bring_whole_tensors(
    layout: Layout, *, adapters: Sequence[MergeableAdapter], recipe: Recipe, inputs: Inputs
) -> WholeTensors:
    """Return what becomes of the output's tensors by those that adapters hold whole.

    Args:
        layout: the output's tensors before.
        adapters: in the recipe's order.
        recipe: says what becomes of ties, and whose tensors win.
        inputs: holds the digests of these tensors, and the heads that they may be of.
    """
    if not any(adapter.parts.frozen or adapter.parts.replaced for adapter in adapters):
        return WholeTensors(
            layout=layout, placements=Placements(), owners={}, regrown={}, must_cut=False, issues=(), notes=()
        )
    step = _Bringing(layout, recipe, inputs)
    for adapter in adapters:
        for parameter, tensor in adapter.parts.frozen.items():
            step.freeze(adapter, parameter, tensor)
        for parameter, tensor in adapter.parts.replaced.items():
            step.replace(adapter, parameter, tensor)
    return step.result()


class _Bringing:
    """The step while it goes on: what it returns, and the frozen tensors so far.

    A base may have 60,000 tensors and an adapter bring thousands, so what the tensors begin as is one dictionary, which
    the layout of the step has too; nobody else does before the step is done.
    """

    def __init__(self, layout: Layout, recipe: Recipe, inputs: Inputs) -> None:
        self._recipe = recipe
        self._inputs = inputs
        self._take(layout)
        self._placements = Placements()
        self._owners: dict[str, str] = {}
        self._regrown: dict[str, str] = {}
        self._must_cut = False
        self._issues: list[str] = []
        self._notes: list[str] = []
        self._frozen: dict[str, tuple[str, Digest]] = {}

    def _take(self, layout: Layout) -> None:
        self._sources = dict(layout.sources)
        self._layout = layout.with_sources(self._sources)

    def result(self) -> WholeTensors:
        """Return what came of it."""
        return WholeTensors(
            layout=self._layout, placements=self._placements, owners=self._owners, regrown=self._regrown,
            must_cut=self._must_cut, issues=tuple(self._issues), notes=tuple(self._notes),
        )  # fmt: skip

    def freeze(self, mergeable: MergeableAdapter, parameter: str, tensor: TensorInfo) -> None:
        """Take a tensor that an adapter saved along: all that adapters have of it must be the same."""
        found = self._find(mergeable, parameter)
        if found is None:
            return
        adapter, digest = mergeable.adapter, self._digest(mergeable, tensor)
        name = found.parts[0].name
        owner, other = self._frozen.setdefault(name, (adapter.name, digest))
        if other != digest:
            self._issues.append(
                f"{adapter.source}: '{tensor.name}' and the one of adapter {owner} differ: "
                "they were trained on different bases"
            )
        self._notes.append(f"{name} comes from adapter {adapter.name}, which saved its base's along")
        # a tie that has been cut was whole in training: what the base had there, all had
        new = self._layout.tied_weights.cut_names() if self._layout.tied_weights.is_cut else {}
        root = new.get(name, name)
        for shared in (root, *(n for n, r in new.items() if r == root)):
            plain = found if shared == name else replace(found, name=shared, parts=(Part(name=shared),))
            self._put(adapter, plain, tensor)

    def replace(self, mergeable: MergeableAdapter, parameter: str, tensor: TensorInfo) -> None:
        """Let a tensor of an adapter take the place of a parameter, if no other one does."""
        adapter = mergeable.adapter
        for copy in mergeable.parts.copies.get(parameter, ()):
            if self._digest(mergeable, copy) != self._digest(mergeable, tensor):
                self._issues.append(
                    f"{adapter.source}: '{tensor.name}' and '{copy.name}' both replace {parameter} and differ; "
                    "delete the one that is not meant"
                )
        weight = factor(adapter.weight, parameter, Layers(self._layout.sources))
        if weight != 1:
            self._issues.append(
                f"{adapter.source}: has weight {weight!r}, but it replaces {parameter} whole, "
                "which cannot be weighted; set its weight to 1"
            )
        if self._find(mergeable, parameter) is None:
            return
        self._separate(mergeable, parameter)
        found = self._layout.look(parameter)
        assert found is not None
        if self._wins(adapter, [part.name for part in found.parts]):
            self._put(adapter, found, tensor)

    def _separate(self, mergeable: MergeableAdapter, parameter: str) -> None:
        """Give a tied parameter a tensor of its own, unless all that share one are replaced by one value."""
        if self._is_replaced_alike(mergeable, parameter):
            return
        separation = separate(self._layout, parameter, tied=self._recipe.tied_embeddings, replaces=True)
        self._must_cut |= separation.must_cut
        self._issues += separation.issues
        self._notes += separation.notes

    def _is_replaced_alike(self, mergeable: MergeableAdapter, parameter: str) -> bool:
        """Whether an adapter replaces all that share a tensor by one value."""
        if not self._layout.tied_weights.shared(parameter):
            return not self._layout.tied_weights.is_kept_apart(parameter)
        replaced = mergeable.parts.replaced
        values = {
            next((self._digest(mergeable, t) for p, t in replaced.items() if same_parameter(p, member)), None)
            for member in self._layout.tied_weights.members(parameter)
        }
        return len(values) == 1 and None not in values

    def _wins(self, adapter: Adapter, names: Sequence[str]) -> bool:
        """Whether an adapter's tensor is the one to take for the disk tensors of a parameter."""
        owner, winner = self._owners.get(names[0], adapter.name), self._recipe.saved_modules_from
        if owner != adapter.name and winner not in (owner, adapter.name):
            self._issues.append(
                f"adapters {owner} and {adapter.name} both replace {names[0]}; say which one's to take: "
                f"saved_modules_from: {adapter.name}, or merge only one of them"
            )
        if adapter.name not in (owner, winner):
            return False
        self._owners |= dict.fromkeys(names, adapter.name)
        return True

    def _put(self, adapter: Adapter, parameter: Parameter, tensor: TensorInfo) -> None:
        """Let a tensor of an adapter take the place of a parameter, wherever it lies on disk."""
        stored = {self._sources[part.name].dtype for part in parameter.parts}
        if tensor.dtype not in FLOATS and {tensor.dtype} != stored:
            expected = sorted(FLOATS) if stored <= FLOATS else sorted(stored)
            self._issues.append(f"{adapter.source}: '{tensor.name}' is {tensor.dtype}, expected one of {expected}")
        elif tensor.shape == parameter.shape or self._regrows(adapter, parameter, tensor.shape):
            for part in parameter.parts:
                self._put_part(adapter, parameter, part, tensor)
        else:
            self._issues.append(
                f"{adapter.source}: '{tensor.name}' is {list(tensor.shape)}, the base's {parameter.name} is "
                f"{list(parameter.shape)}; {self._why_misfit(parameter.shape, tensor.shape)}"
            )

    def _why_misfit(self, there: tuple[int, ...], brought: tuple[int, ...]) -> str:
        """Return the cause of a shape that is not the parameter's: a classifier of other labels, or another base."""
        labels = self._layout.config.num_labels
        if not brought or (len(brought), brought[1:], labels) != (len(there), there[1:], there[0]):
            return "was it trained on another base?"
        return (
            f"it was trained with {brought[0]} labels, and the base has {labels}: load the base by from_pretrained(..."
            f", num_labels={brought[0]}, ignore_mismatched_sizes=True), save it by save_pretrained, and build on that"
        )

    def _put_part(self, adapter: Adapter, parameter: Parameter, part: Part, tensor: TensorInfo) -> None:
        disk = self._sources[part.name]
        if (part.expert, part.rows, part.transposed) == (None, None, False):
            self._sources[part.name] = tensor
        elif part.transposed or (rows := _contiguous(part, disk)) is None:
            self._issues.append(
                f"{adapter.source}: replaces {parameter.name} whole, which the base stores in another order"
            )
        elif len(rows) == disk.shape[0]:
            self._sources[part.name] = replace(_rows_of(tensor, part.expert, rows), shape=disk.shape)
        else:
            update = replacement(adapter.name, _rows_of(tensor, part.expert, rows), range(len(rows)))
            placed = PlacedUpdate(update=update, start=part.first, stop=part.first + len(rows))
            self._issues += self._placements.place(part.name, placed, stored=disk, columns=width(disk))

    def _regrows(self, adapter: Adapter, parameter: Parameter, shape: tuple[int, ...]) -> bool:
        """Whether a shape is the parameter's with another vocabulary; the model then has the adapter's."""
        old = parameter.shape
        if not is_plain(parameter) or (len(shape), shape[1:]) != (len(old), old[1:]):
            return False
        if old[0] != self._layout.config.vocab_size:
            return False
        self._regrown[parameter.parts[0].name] = adapter.name
        return True

    def _find(self, mergeable: MergeableAdapter, parameter: str) -> Parameter | None:
        """Return the parameter that a whole tensor is of, adding a head where it is new; report what is missing."""
        found = self._layout.look(parameter)
        if found is None and self._add_head(mergeable):
            found = self._layout.look(parameter)
        if found is None:
            self._issues.append(f"{mergeable.adapter.source}: {self._layout.missing(parameter)}")
        return found

    def _add_head(self, mergeable: MergeableAdapter) -> bool:
        """Whether an adapter was trained with a head that the model has not got yet; it then has it."""
        adapter, head = mergeable.adapter, self._inputs.heads.get(mergeable.adapter.source, Head())
        self._issues += head.problems
        if not head.added:
            return False
        if self._layout.has_new_head:
            self._issues.append(f"{adapter.source}: brings another head than an adapter before it; merge one of them")
            return False
        tensors = {name: mergeable.parts.replaced[path] for name, path in head.added.items()}
        self._take(self._layout.with_head(head, tensors))
        self._notes += head.notes
        return True

    def _digest(self, mergeable: MergeableAdapter, tensor: TensorInfo) -> Digest:
        return self._inputs.digests[TensorKey(mergeable.adapter.name, tensor.name)]


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
