"""What the weights of a build are, told by the test's own reading of its files, whatever lora-build says of them."""

import hashlib
import json
from pathlib import Path


def sha256_of_weights(folder: Path) -> str:
    """Return the SHA-256 of [[name, dtype, shape, SHA-256 of the bytes], ...] by name: canonical JSON, as in version 1.

    Goldens hold it: it stays what it is when manifests change.
    """
    rows = []
    for path in folder.glob("*.safetensors"):
        data = memoryview(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8:start]))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            first, end = tensor["data_offsets"]
            digest = hashlib.sha256(data[start + first : start + end]).hexdigest()
            rows.append([name, tensor["dtype"], tensor["shape"], f"sha256:{digest}"])
    text = json.dumps(sorted(rows), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
