"""Making: the blocks of an output tensor, wherever the base's rows come from and whichever backend makes them.

An operation is cut into tasks. Each has its input read and its place taken when it is handed out, so that files are
read and written from their beginnings to their ends; what is left of it, a call that any thread may make, takes no more
than a few MB and gives the interpreter's lock away.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from lora_build.dtypes import FLOATS, num_bytes
from lora_build.engine.backends.choice import Backends, Offer
from lora_build.engine.blocks import Block, Cast, Data, Merger, Piece
from lora_build.engine.not_finite import copied
from lora_build.files.buffers import Buffers
from lora_build.files.executor import StageTimer
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.hashing.hashed_file import CHUNK_BYTES
from lora_build.planning.operations import Merge, Operation, Segment


class Bytes(Protocol):
    """Where the bytes of tensors come from."""

    def read(self, tensor: TensorInfo, start: int, stop: int, into: memoryview | None = None) -> Data:
        """Return the bytes [start, stop) of a tensor, in memory that is given for them or of its own."""

    def factor(self, tensor: TensorInfo, keep: bool = False) -> Data:
        """Return a whole tensor of an adapter, kept for a while if somebody is to ask for it again."""


class Room(Protocol):
    """Where the bytes of an output tensor go, in order."""

    def num_rows(self, row_bytes: int) -> int:
        """Return how many rows the next place can have without being cut."""

    def place(self, size_bytes: int) -> memoryview:
        """Return memory for the next bytes."""


@dataclass(frozen=True, kw_only=True)
class Maker:
    """Makes the blocks of operations.

    Attributes:
        inputs: where bytes come from.
        backends: what makes blocks of them.
        timer: is told how long that took.
        check: whether values that are not finite are told.
        measures: whether what rounding leaves of an update is told.
        is_ready: waits for what puts backends to the test meanwhile; raises what that raised.
        buffers: memory for what is read; None leaves it to the inputs.
    """

    inputs: Bytes
    backends: Backends
    timer: StageTimer = field(default_factory=StageTimer)
    check: bool = False
    measures: bool = True
    is_ready: Callable[[], object] = lambda: None
    buffers: Buffers | None = None

    def tasks(self, op: Operation, out: Room) -> Iterator[Callable[[], Block]]:
        """Yield what makes the blocks of a tensor, in order and one at least."""
        num_elements = op.source.num_elements
        if not num_elements:
            yield partial(Block, data=out.place(0))
        elif isinstance(op, Merge):
            at, measured = 0, set[str]()
            for offer, segment in self.backends.pieces(op):
                yield from self._unmerged(op, at * op.columns, segment.start * op.columns, out)
                yield from self._merged(self._merger(op, offer, segment), op, segment, measured, out)
                at = segment.stop
            yield from self._unmerged(op, at * op.columns, num_elements, out)
        else:
            yield from self._unmerged(op, 0, num_elements, out)

    def _merger(self, op: Merge, offer: Offer, segment: Segment) -> Merger:
        """Return what merges the rows of a segment, its factors loaded and made ready."""
        with self.timer.time("wait for load"):
            self.is_ready()
        with self.timer.time("load torch" if offer.uses_torch else "prepare"):
            backend = self.backends.for_merge(offer, op.dtype)
        piece = Piece(
            op=op, segment=segment, combination=self.backends.combination, check=self.check,
            read=partial(self._rows, op, segment), factor=self.inputs.factor,
        )  # fmt: skip
        with self.timer.time("prepare"):
            return backend.merger(piece)

    def _merged(
        self, merger: Merger, op: Merge, segment: Segment, measured: set[str], out: Room
    ) -> Iterator[Callable[[], Block]]:
        """Yield what merges the rows of a segment; the first block measures the adapters not `measured` yet."""
        num_rows, row_bytes = segment.stop - segment.start, op.columns * num_bytes(op.dtype)
        size = num_bytes(op.source.dtype)
        if merger.num_elements is None:  # all of it at once, in memory of the backend's own
            rows, nothing = self._rows(op, segment, 0, num_rows), frozenset[str]()
            task = partial(merger.block, rows, memoryview(b""), 0, place=segment.start * op.columns, measured=nothing)
            yield partial(self._timed, task)
            return
        adapters = {update.adapter for update in segment.updates}
        known, first = frozenset(measured), 0
        measured |= adapters
        most = max(1, merger.num_elements // op.columns)
        while first < num_rows:
            # adapters beside others are measured on as many rows wherever in the file these lie
            to_share = len(adapters) > 1 and not adapters <= known
            last = min(first + (most if to_share else min(most, out.num_rows(row_bytes))), num_rows)
            rows = self._rows(op, segment, first, last, self._buffer((last - first) * op.columns * size))
            memory, place = out.place((last - first) * row_bytes), (segment.start + first) * op.columns
            asked = known if self.measures else None
            yield partial(self._timed, partial(merger.block, rows, memory, first, place=place, measured=asked))
            known, first = frozenset(measured), last

    def _unmerged(self, op: Operation, first: int, stop: int, out: Room) -> Iterator[Callable[[], Block]]:
        """Yield what copies or converts the elements [first, stop) of a tensor."""
        source, target = op.source.dtype, op.dtype
        size, out_size = num_bytes(source), num_bytes(target)
        cast = Cast(source=source, target=target, check=self.check)
        backend = None if source == target or first == stop else self.backends.for_conversion(source, target)
        checks = self.check and source in FLOATS
        while first < stop:
            last = min(first + min(CHUNK_BYTES // size, out.num_rows(out_size)), stop)
            memory = out.place((last - first) * out_size)
            with self.timer.time("read"):
                into = memory if backend is None else self._buffer((last - first) * size)
                data = self.inputs.read(op.source, first * size, last * size, into)
            if backend is None:
                yield (
                    partial(self._timed, partial(copied, memory, source, first))
                    if checks
                    else partial(Block, data=memory)
                )
            else:
                yield partial(self._timed, partial(backend.converted, cast, data, memory, first))
            first = last

    def _buffer(self, size_bytes: int) -> memoryview | None:
        return None if self.buffers is None else self.buffers.take(size_bytes)

    def _rows(self, op: Merge, segment: Segment, start: int, stop: int, into: memoryview | None = None) -> Data:
        """Return the source's rows [start, stop) of a segment; only the thread that reads has buffers to give."""
        width = op.columns * num_bytes(op.source.dtype)
        with self.timer.time("read"):
            return self.inputs.read(op.source, (segment.start + start) * width, (segment.start + stop) * width, into)

    def _timed(self, task: Callable[[], Block]) -> Block:
        with self.timer.time("merge"):
            return task()
