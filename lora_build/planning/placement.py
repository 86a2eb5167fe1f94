"""Placement: from a parameter in memory to the stored rows on disk that an update of it changes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from lora_build.dtypes import MERGEABLE
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.methods.interface import PeftLayer, PlacedUpdate, Update
from lora_build.models.parameters import Parameter, Part
from lora_build.planning.operations import Segment


@dataclass(slots=True)
class Placements:
    """The updates of each output tensor, in the recipe's order, while a step of the planner adds its own.

    Attributes:
        updates: of each tensor that has any.
        columns: the width of the matrix that such a tensor is seen as.
    """

    updates: dict[str, list[PlacedUpdate]] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)

    def copy(self) -> "Placements":
        """Return the same placements, for the next step to add to."""
        return Placements({name: list(updates) for name, updates in self.updates.items()}, dict(self.columns))

    def place(self, name: str, update: PlacedUpdate, *, stored: TensorInfo, columns: int) -> list[str]:
        """Add an update of some rows of an output tensor; return what keeps it from being merged.

        Args:
            name: the output tensor.
            update: what happens to which of its rows.
            stored: what the output tensor begins as.
            columns: the width of the matrix that the tensor is seen as.
        """
        if self.columns.setdefault(name, columns) != columns:
            return [f"{name}: one adapter updates it as a stack of matrices and another one as one"]
        self.updates.setdefault(name, []).append(update)
        return [
            f"{tensor.source}: {tensor.name} is {tensor.dtype}; merging needs F32, F16 or BF16"
            for tensor in (stored, *update.factors.values())
            if tensor.dtype not in MERGEABLE and not (tensor.dtype == "F64" and not tensor.source.is_base)
        ]

    def spread(
        self, update: Update, parameter: Parameter, *, sources: Mapping[str, TensorInfo], peft: PeftLayer | None
    ) -> list[str]:
        """Add an update of a parameter to every disk tensor that holds some of it; return what keeps it from that.

        Args:
            update: what happens to the parameter.
            parameter: where it lies.
            sources: what each output tensor begins as.
            peft: the layer of peft that merges it, where its operations are repeated.
        """
        issues = []
        for part in parameter.parts:
            stored = sources[part.name]
            if update.whole and part.rows is not None:
                issues.append(
                    f"{parameter.name}: adapter {update.adapter} needs all of it at once, the base's {part.name} holds "
                    "only some of its rows"
                )
                return issues
            columns = width(stored) if update.stack is None else stored.shape[-1]
            for placed in _on_disk(part, stored, update, peft):
                issues += self.place(part.name, placed, stored=stored, columns=columns)
        return issues


def _on_disk(part: Part, stored: TensorInfo, update: Update, peft: PeftLayer | None) -> Iterator[PlacedUpdate]:
    """Yield an update of the rows that a disk tensor holds: one, or one for each matrix of a stack."""
    in_one_stack = update.stack is not None and part.expert is None
    matrix = stored.shape[-2:] if update.stack is not None or part.expert is not None else (stored.shape or (1,))
    stop = part.first + (matrix[0] if part.rows is None else len(part.rows))
    for number in range(stored.shape[0] if in_one_stack else 1):
        above = number * matrix[0]
        yield PlacedUpdate(
            update=update, start=above + part.first, stop=above + stop, rows=part.rows,
            expert=number if in_one_stack else part.expert, transposed=update.transposed != part.transposed, peft=peft,
        )  # fmt: skip


def width(tensor: TensorInfo) -> int:
    """Return the columns of a tensor seen as a matrix of its first dimension; a vector is a column."""
    return tensor.num_elements // tensor.shape[0] if tensor.shape and tensor.shape[0] else 1


def cut(placed: Sequence[PlacedUpdate]) -> tuple[Segment, ...]:
    """Return segments for updates of stored rows, each cut wherever another one begins or ends."""
    if len(placed) == 1:  # nearly all
        (only,) = placed
        return (Segment(start=only.start, stop=only.stop, updates=(only,)),) if only.start < only.stop else ()
    waiting = sorted(enumerate(placed), key=lambda item: item[1].start, reverse=True)
    edges = sorted({edge for update in placed for edge in (update.start, update.stop)})
    segments: list[Segment] = []
    here: list[tuple[int, PlacedUpdate]] = []
    for start, stop in pairwise(edges):
        while waiting and waiting[-1][1].start <= start:
            here.append(waiting.pop())
        here = sorted((item for item in here if item[1].stop > start), key=lambda item: item[0])
        if here:
            updates = tuple(update.part(start, stop) for _, update in here)
            segments.append(Segment(start=start, stop=stop, updates=updates))
    return tuple(segments)
