"""Parameters: what a model calls them in memory, and the tensors on disk that hold them."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one disk tensor holds of an in-memory parameter.

    The parameter is a vector `[n]`, a matrix `[out, in]`, a kernel `[out, in, ...]` or a stack of matrices
    `[E, out, in]` or of vectors `[E, out]`. Rows are counted along `out` (`n` of a vector). A stack that lies on disk
    as a stack has the same rows in each of its matrices.

    Attributes:
        name: the tensor on disk.
        expert: which matrix of the stack the disk tensor holds (rows of); None: the disk tensor has the parameter's
            dimensions, or is a kernel of which the parameter `[out, in]` is the flat form.
        rows: for each row that lies there, the parameter's row: a range where contiguous, else a tuple; None: all of
            them in order, and the disk tensor holds nothing else.
        first: the disk tensor's row (of its matrix) where they begin.
        transposed: whether disk stores the matrix (each matrix of the stack) transposed; only with all rows.
    """

    name: str
    expert: int | None = None
    rows: Sequence[int] | None = None
    first: int = 0
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter of a model and where it lies on disk.

    Attributes:
        name: its path in memory, as the installed transformers has it, or its disk name where that is exact.
        shape: its shape in memory.
        parts: what makes it up, by expert and row; together they hold each element once.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
