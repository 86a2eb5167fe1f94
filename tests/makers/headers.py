"""Models and adapters by their configs, names and shapes alone; the values follow from the names.

    entry = describe(folder, "config.json")            # of a folder as on the Hub, or as peft saves it
    write(entry, other, "config.json", salt="llama")   # the same names, shapes and dtypes, other values

No random generator, no library that initialises and no version of one decides a byte of what is written, so a digest of
what is built from it stays what it is.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from makers.small import values

Entry = Mapping[str, Any]
"""`config` (of its file), and `files`: file -> tensor -> [dtype, shape, seed] or, of few or whole numbers, their list."""


def describe(folder: Path, config: str) -> Entry:
    """Return the entry of a base or an adapter; tensors of the same content get the same seed."""
    files: dict[str, Any] = {}
    seeds: dict[Any, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        files[file.name] = {}
        for name, tensor in sorted(load_file(file).items()):
            content = (tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            literal = tensor.numel() == 1 or not tensor.is_floating_point()
            seed = tensor.flatten().tolist() if literal else seeds.setdefault(content, name)
            dtype = str(tensor.dtype).removeprefix("torch.")
            files[file.name][name] = [dtype, [*tensor.shape], *([] if seed == name else [seed])]
    return {"config": json.loads((folder / config).read_text()), "files": files}


def write(entry: Entry, folder: Path, config: str, *, salt: str = "") -> Path:
    """Write the folder of an entry; another `salt` gives other values."""
    folder.mkdir(parents=True)
    weight_map = {}
    for file, tensors in entry["files"].items():
        made = {name: _tensor(salt, name, *spec) for name, spec in tensors.items()}
        save_file(made, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(made, file)
    if len(entry["files"]) > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / config).write_text(json.dumps(entry["config"], indent=2, sort_keys=True) + "\n")
    return folder


def _tensor(salt: str, name: str, dtype: str, shape: list[int], seed: str | list[Any] | None = None) -> Tensor:
    to = getattr(torch, dtype)
    if isinstance(seed, list):
        return torch.tensor(seed, dtype=to).reshape(shape)
    number = zlib.crc32(f"{'' if '.base_layer.' in name else salt} {seed or name}".encode())  # all bring the same base
    made = values(number % 65_521, *shape, dtype=torch.float64)
    if made.numel() == max(shape):  # norms, biases, magnitudes
        return (1 + made / 2).to(to)
    rows = 2.0 ** -(torch.arange(len(made)) * 7 % 9)  # some updates drown in W, some rule it
    return (0.4 * made * rows.reshape(-1, *[1] * (made.ndim - 1))).to(to)
