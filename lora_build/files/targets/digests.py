"""Nowhere as the target: files are made and hashed, block by block, and no byte of them is kept or written."""

from lora_build.files.buffers import Buffers
from lora_build.files.identity import Digest, FileRecord
from lora_build.files.targets.file_writer import BLOCK_BYTES, SPARE_BYTES, FileQueues, FileWriter


class DigestTarget:
    """Takes files as a directory does, and has only their digests."""

    def __init__(self) -> None:
        self._buffers = Buffers(BLOCK_BYTES + SPARE_BYTES)

    def open(self, name: str, size_bytes: int, queues: FileQueues | None = None) -> FileWriter:
        """Return a writer for a new file."""
        return FileWriter(None, name, size_bytes, self._buffers, queues or FileQueues())

    def write(self, name: str, data: bytes) -> FileRecord:
        """Take a small file whole."""
        return FileRecord(path=name, size_bytes=len(data), sha256=Digest.sha256(data))
