"""The engine on tensors in memory: the same blocks, made by the same backends, so the bits of a build."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_build.dtypes import name_of, torch_dtype
from lora_build.engine.backends.choice import EXACT, Backends
from lora_build.engine.blocks import Data
from lora_build.engine.making import Maker
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.methods.combine.interface import Combination, combinations
from lora_build.planning.operations import Merge, Operation

if TYPE_CHECKING:
    from torch import Tensor


class TensorMerger:
    """Merges one tensor after another in memory; its arithmetic is put to the test when it is first needed."""

    def __init__(self, load: "Callable[[TensorInfo], Tensor]", combination: Combination | None = None) -> None:
        """Take what reads a tensor of an adapter, and what combines adapters; without it they are added up."""
        self._load = load
        self._backends = Backends(EXACT, combination or combinations()["linear"])

    def test_for(self, operations: Iterable[Operation]) -> None:
        """Put the arithmetic of some operations to the test before the first of them is made.

        Raises:
            MergeError: this machine's fails it.
        """
        self._backends.test_for(operations, with_torch=True)

    def merge(self, operation: Operation, W: "Tensor") -> "Tensor":
        """Return an output tensor, on the CPU; it may be W itself where nothing happens to it.

        Args:
            operation: what happens to it; its dtype is the result's, that of its source need not be W's.
            W: the base's values, of any layout; not used where an adapter's tensor replaces them.

        Raises:
            MergeError: this machine's arithmetic fails the self-test.
        """
        import torch

        W = (W if operation.source.source.is_base else self._load(operation.source)).detach().cpu()
        stored = name_of(W.dtype)
        if not isinstance(operation, Merge) and stored == operation.dtype:
            return W
        operation = replace(operation, source=replace(operation.source, dtype=stored))
        out = torch.empty(operation.source.shape, dtype=torch_dtype(operation.dtype))
        room = _Room(_bytes(out))
        inputs = _Inputs(operation.source, W.contiguous(), self._load)
        for task in Maker(inputs=inputs, backends=self._backends, measures=False).tasks(operation, room):
            room.put(task().data)
        return out


class _Inputs:
    """A base's tensor in memory, and tensors of adapters."""

    def __init__(self, source: TensorInfo, W: "Tensor", load: "Callable[[TensorInfo], Tensor]") -> None:
        self._source = source
        self._data = _bytes(W)
        self._load = load

    def read(self, tensor: TensorInfo, start: int, stop: int, into: memoryview | None = None) -> Data:
        assert tensor is self._source
        found = self._data[start:stop]
        if into is None:
            return found
        into[:] = found
        return into

    def factor(self, tensor: TensorInfo, keep: bool = False) -> Data:
        return _bytes(self._load(tensor).detach().cpu().contiguous())


class _Room:
    """The memory of an output tensor, of which one block is made at a time."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._placed = 0
        self._last = memory[:0]

    def num_rows(self, row_bytes: int) -> int:
        return max(1, len(self._memory) // row_bytes)

    def place(self, size_bytes: int) -> memoryview:
        self._last = self._memory[self._placed : self._placed + size_bytes]
        self._placed += size_bytes
        return self._last

    def put(self, data: Data) -> None:
        """Take the block that was made for the last place, perhaps in it."""
        if data is not self._last:
            self._last[:] = data


def _bytes(tensor: "Tensor") -> memoryview:
    """Return the bytes of a contiguous tensor, without a copy."""
    import torch

    values: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(values)
