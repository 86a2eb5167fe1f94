"""One recipe written out, and the short forms of its parts."""

from typing import Any

LONG: dict[str, Any] = {
    "base": {"source": "org/base", "revision": "v1"},
    "adapters": {"one": {"source": "org/one", "revision": "v2"}},
    "combine": {"method": "linear"},
    "output": {"dir": "./out", "max_shard_size": "5GB"},
}
SHORT: dict[str, dict[str, Any]] = {
    "a revision behind the source": {"base": "org/base@v1"},
    "a revision behind the source of a mapping": {"base": {"source": "org/base@v1"}},
    "the same revision twice": {"base": {"source": "org/base@v1", "revision": "v1"}},
    "one adapter": {"adapters": "org/one@v2"},
    "a list of sources": {"adapters": ["org/one@v2"]},
    "a list of mappings": {"adapters": [{"source": "org/one", "revision": "v2"}]},
    "a list with a name": {"adapters": [{"name": "one", "source": "org/one@v2"}]},
    "a mapping of sources": {"adapters": {"one": "org/one@v2"}},
    "a method": {"combine": "linear"},
    "bytes": {"output": {"dir": "./out", "max_shard_size": 5_000_000_000}},
    "bytes as text": {"output": {"dir": "./out", "max_shard_size": "5000000000"}},
    "a smaller unit": {"output": {"dir": "./out", "max_shard_size": "5000 mb"}},
}
