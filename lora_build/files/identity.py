"""What inputs, files, tensors and bytes go by: each a value of its own, where text alone could be taken for another.

Names and digests are text, and stay it: they go into JSON, messages and dictionaries as they are.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from blake3 import blake3

_ADAPTERS = "adapters."


class SourceName(str):
    """An input of a recipe, by its key there: `base`, or `adapters.<name>`."""

    __slots__ = ()

    @classmethod
    def of_adapter(cls, name: str) -> "SourceName":
        """Return the name of an adapter's source; `SourceName.of_adapter(name).adapter_name == name`."""
        return cls(_ADAPTERS + name)

    @property
    def is_base(self) -> bool:
        """Whether it is the base."""
        return self == BASE

    @property
    def adapter_name(self) -> str:
        """The adapter's name in the recipe."""
        assert self.startswith(_ADAPTERS), f"{self} is no adapter"
        return self[len(_ADAPTERS) :]


BASE = SourceName("base")


class FileKey(NamedTuple):
    """A file of an input: ("base", "config.json")."""

    source: SourceName
    name: str


class TensorKey(NamedTuple):
    """A tensor of an adapter: the adapter's name, and the tensor's as the file has it."""

    adapter: str
    name: str


class Hash(Protocol):
    """A digest that is being taken, of an algorithm that is known from elsewhere."""

    def update(self, data: bytes | bytearray | memoryview, /) -> Any:
        """Append bytes."""

    def hexdigest(self) -> str:
        """Return the digest of the bytes so far, in hexadecimal."""


def new_hash(algorithm: str) -> Hash:
    """Return the hash of no bytes yet, `sha256` or `blake3`."""
    return blake3() if algorithm == "blake3" else hashlib.new(algorithm)


class Digest(str):
    """The digest of some bytes, its algorithm in front.

    `sha256:<64 hex>`; `blake3:<64 hex>`, which tensors have, three to five times as fast; or
    `git-sha1:<40 hex>`: git's blob id, which the Hub gives for small files.
    """

    __slots__ = ()

    @classmethod
    def sha256(cls, data: bytes | bytearray | memoryview) -> "Digest":
        """Return the SHA-256 of bytes."""
        return cls.of_hash(hashlib.sha256(data))

    @classmethod
    def of_hash(cls, found: Hash) -> "Digest":
        """Return the SHA-256 of the bytes that a hash has seen so far."""
        return cls.of_hex(found.hexdigest())

    @classmethod
    def of_hex(cls, text: str) -> "Digest":
        """Return the SHA-256 that 64 hexadecimal digits are."""
        return cls(f"sha256:{text}")

    @classmethod
    def blake3(cls, data: bytes | bytearray | memoryview) -> "Digest":
        """Return the BLAKE3 of bytes."""
        return cls.of("blake3", blake3(data))

    @classmethod
    def of(cls, algorithm: str, found: Hash) -> "Digest":
        """Return the digest of the bytes that a hash of an algorithm has seen so far."""
        return cls(f"{algorithm}:{found.hexdigest()}")

    @classmethod
    def of_git(cls, blob_id: str) -> "Digest":
        """Return git's SHA-1 of a file, from the id of its blob."""
        return cls(f"git-sha1:{blob_id}")

    @property
    def algorithm(self) -> str:
        """`sha256`, `blake3` or `git-sha1`."""
        return self.partition(":")[0]

    @property
    def hex(self) -> str:
        """The hexadecimal digits."""
        return self.partition(":")[2]

    @property
    def is_git(self) -> bool:
        """Whether it is git's SHA-1 of a blob."""
        return self.algorithm == "git-sha1"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file of an input or of the output: its name there, its size, its SHA-256."""

    path: str
    size_bytes: int
    sha256: Digest
