"""Reading: the input files of a run, each read once from its beginning to its end where the plan allows it."""

from collections.abc import Mapping
from contextlib import ExitStack

from lora_build.engine.blocks import Data
from lora_build.files.executor import SerialQueue
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.hashing.hashed_file import HashedFile
from lora_build.files.identity import FileKey, FileRecord, SourceName
from lora_build.files.sources import Source, open_hashed
from lora_build.planning.plan import MergePlan


class InputFiles:
    """The input files, opened when first read, and hashed in a queue."""

    def __init__(self, sources: Mapping[SourceName, Source], opened: ExitStack, queue: SerialQueue) -> None:
        """Take where they are, what closes them in the end, and where they are hashed."""
        self._sources = sources
        self._opened = opened
        self._queue = queue
        self._files: dict[FileKey, HashedFile] = {}
        self._kept: dict[TensorInfo, Data] = {}
        self._num_kept = 4 * len(sources)  # both factors of two stacks, of each adapter

    def read(self, tensor: TensorInfo, start: int, stop: int, into: memoryview | None = None) -> Data:
        """Return the bytes [start, stop) of a tensor."""
        file = self._file(FileKey(tensor.source, tensor.file))
        return file.read(tensor.start + start, tensor.start + stop, into)

    def factor(self, tensor: TensorInfo, keep: bool = False) -> Data:
        """Return a whole tensor; the factors of a stack are kept for its other matrices, the last ones used."""
        if (kept := self._kept.pop(tensor, None)) is None:
            kept = self.read(tensor, 0, tensor.num_bytes)
        if keep:
            self._kept[tensor] = kept
            if len(self._kept) > self._num_kept:
                del self._kept[next(iter(self._kept))]
        return kept

    def finish(self, plan: MergePlan) -> dict[FileKey, FileRecord]:
        """Hash what was not read and return the digest of every weight file."""
        records = {}
        for source, names in plan.input_files.items():
            for name in (n for n in names if n.endswith(".safetensors")):
                size = self._sources[source].files[name].size_bytes
                key = FileKey(source, name)
                records[key] = FileRecord(path=name, size_bytes=size, sha256=self._file(key).finish())
        return records

    def _file(self, key: FileKey) -> HashedFile:
        if key not in self._files:
            file = open_hashed(self._sources[key.source], key.name, self._queue)
            self._files[key] = self._opened.enter_context(file)
        return self._files[key]
